"""What happens to images and prompts before a network sees them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from deradiff.scorers.preparation import centre_crop, letterbox
from tests.support import tiny_blip, tiny_clip
from tests.support.scorer_images import noise


def test_letterbox_pads_with_black_and_keeps_the_overshoot() -> None:
    # 80 x 20, black beside white
    pixels = np.zeros((20, 80, 3), dtype=np.uint8)
    pixels[:, 40:] = 255
    boxed = letterbox(Image.fromarray(pixels), 32)
    assert boxed.shape == (3, 32, 32)
    assert (boxed[:, :12] == 0).all()
    assert (boxed[:, 20:] == 0).all()

    # Bicubic, not clamped
    assert boxed.max() > 1.01
    assert boxed.min() < -0.01


@pytest.mark.parametrize(
    "size", [(64, 70), (39, 32), (32, 37), (33, 32), (20, 13), (90, 50), (32, 32)]
)
def test_the_crop_is_torchvisions(size: tuple[int, int]) -> None:
    image = noise(size)
    mean = np.reshape(tiny_clip.MEAN, (3, 1, 1))
    deviation = np.reshape(tiny_clip.DEVIATION, (3, 1, 1))
    pixels = (centre_crop(image, 32).double().numpy() - mean) / deviation
    assert abs(pixels - tiny_blip.centred(image)).max() < 1e-5
