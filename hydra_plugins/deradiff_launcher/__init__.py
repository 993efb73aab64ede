"""Hydra's side of `--multirun`: one process group per value. Found by Hydra because it lies in `hydra_plugins`."""
