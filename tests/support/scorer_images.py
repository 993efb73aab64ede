"""Images, prompts and comparisons that the tests of the scorers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from deradiff.scorers import check_scorer, load_scorer
from tests.support.tiny_clip import SIDE

# Square, wide, tall, smaller than the network's side, and oblong with the longest side already
# right.
SIZES = [(64, 64), (90, 50), (41, 77), (20, 13), (SIDE, 20), (SIDE, SIDE)]

PROMPTS = [
    "a red fox",
    "Two  FOXES",
    "it's 4 cats, & a dog",
    "fox",
    "caf\u00e9 noir",
    "a sentence that is longer than the context of this network",
]


def noise(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    """An image with as much detail as there can be, so that a wrong filter shows."""
    width, height = size
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


IMAGES = [noise(size, seed) for seed, size in enumerate(SIZES)]


# And sizes where half to even and rounding down are a pixel apart: 32 x 35 and 39 x 32 after
# resizing.
CROPPED_IMAGES = [*IMAGES, noise((64, 70), 10), noise((39, 32), 11)]
LONG_PROMPTS = [*PROMPTS, "a red fox, in the snow & more", "R2D2's foxes " + "and foxes " * 20]


def assert_close(scores: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """The scores are float32, and the expected ones within an absolute tolerance."""
    assert scores.dtype == torch.float32
    assert scores.shape == expected.shape
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)


def assert_refused(words: str, name: str, *paths: str | Path | None, **settings: Any) -> None:
    """Both the check and the loading refuse with these words, in one line."""
    arguments = [None if path is None else str(path) for path in paths]
    for call in (check_scorer, load_scorer):
        with pytest.raises(ValueError, match=words) as error:
            call(name, *arguments, **settings)
        assert "\n" not in str(error.value)
