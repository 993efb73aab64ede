"""Hydra's side of `--multirun`: a process group for each value.

Hydra finds it because it is in a package called `hydra_plugins`.
"""
