"""Realignment inside a stock diffusers pipeline."""
