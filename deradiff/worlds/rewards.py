"""Scorers that are formulas: the shapes world's true rewards, and one for pictures of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deradiff.scorers.base import BatchedScorer, digest
from deradiff.worlds import shapes


def colourful(images: list[Image.Image], prompts: list[str]) -> Tensor:
    """Colourfulness (N,) of pictures of any size: sigma + .3 mu of the opponent plane, RGB in [0, 255] (Hasler and Suesstrunk 2003)."""
    found = []
    for image in images:
        red, green, blue = np.moveaxis(np.asarray(image, dtype=float), -1, 0)
        red_green, yellow_blue = red - green, (red + green) / 2 - blue
        found.append(
            np.hypot(red_green.std(), yellow_blue.std())
            + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean())
        )
    return torch.tensor(found)


FORMULAS = {"vivid": shapes.vivid, "crisp": shapes.crisp, "colourful": colourful}


class Reward(BatchedScorer):
    """One of `FORMULAS`; see `Scorer`. Its version is the digest of the file that holds the formula."""

    scale = "reward"
    preprocessing = "RGB; as the reward's formula reads it"

    def __init__(self, name: str) -> None:
        self.name = name
        self.reward = FORMULAS[name]
        self.version = digest([Path(self.reward.__code__.co_filename)])

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self.reward(list(images), list(prompts))
