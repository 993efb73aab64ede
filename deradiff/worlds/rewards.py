"""Rewards that are formulas: the shapes world's two true ones, and one for images of any kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deradiff.worlds import shapes


def colourful(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    """Colourfulness (N,) of images of any size: sigma + .3 mu of the opponent plane.

    RGB in [0, 255]; the prompt is not read. Hasler and Suesstrunk 2003.
    """
    scores = []
    for image in images:
        red, green, blue = np.moveaxis(np.asarray(image, dtype=float), -1, 0)
        red_green = red - green
        yellow_blue = (red + green) / 2 - blue
        deviation = np.hypot(red_green.std(), yellow_blue.std())
        mean = np.hypot(red_green.mean(), yellow_blue.mean())
        scores.append(deviation + 0.3 * mean)
    return torch.tensor(scores)


REWARDS = {"vivid": shapes.vivid, "crisp": shapes.crisp, "colourful": colourful}
"""By name: (N RGB images, N prompts) -> rewards (N,)."""
