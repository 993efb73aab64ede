"""The mathematics of the paper: no pipeline and no file."""
