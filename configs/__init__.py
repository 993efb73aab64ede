"""Hydra's side of the project: the groups in YAML, and what all stages share.

`configs.entry` is the one way from a command line to a stage's `run`.
"""
