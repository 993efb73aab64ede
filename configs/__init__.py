"""Hydra's side of the project: the groups in YAML, and `entry`, the one way from a command line to a stage's `run`."""
