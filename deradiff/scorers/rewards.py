"""The shapes world's true rewards as scorers: what a learned scorer can be held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from deradiff.data import shapes
from deradiff.scorers.base import digest


class Reward:
    """A reward that `deradiff.data.shapes` defines, by its name there; see `Scorer`. Its version is the digest of that file."""

    scale = "reward"
    preprocessing = "RGB; as the reward's formula reads it"

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = digest([Path(shapes.__file__)])
        self.reward = {"vivid": shapes.vivid, "crisp": shapes.crisp}[name]

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        if len(images) != len(prompts):
            raise ValueError(f"{self.name} scores each picture for its own prompt: got {len(images)} pictures and {len(prompts)} prompts")
        if not images:
            return torch.empty(0)
        return self.reward([image.convert("RGB") for image in images], list(prompts)).float().cpu()
