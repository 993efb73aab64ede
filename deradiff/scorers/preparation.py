"""What happens to an image and a prompt before CLIP sees them.

Shapes: N images of 3 channels, H rows and W columns; pixels are in [0, 1].
"""

from __future__ import annotations

import html
import re

import ftfy
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Of CLIP's training images, by channel."""

DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images, by channel."""


def letterbox(image: Image.Image, side: int) -> Tensor:
    """Resize an image until its longest side fits, and pad the rest with black.

    Nothing is cropped. HPSv2's preparation (Wu et al. 2023, their `ResizeMaxSize`): bicubic,
    antialiased, and not clamped, so that it overshoots [0, 1] at edges as theirs does. Theirs does
    not pad an oblong image whose longest side is already `side`, and fails; this one pads it.

    Args:
        image: an RGB image of any size.
        side: pixels of the result's side.

    Returns:
        Pixels (3, side, side), about [0, 1].
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    # The longest side becomes `side`.
    scale = side / max(image.size)
    height = round(image.height * scale)
    width = round(image.width * scale)
    resized = F.interpolate(pixels[None], size=(height, width), mode="bicubic", antialias=True)[0]

    # Black on both sides of the shorter one.
    top = (side - height) // 2
    left = (side - width) // 2
    bottom = side - height - top
    right = side - width - left
    return F.pad(resized, (left, right, top, bottom))


def centre_crop(image: Image.Image, side: int) -> Tensor:
    """Resize an image until its shortest side fits, and keep the middle of the longer one.

    As torchvision's Resize and CenterCrop on a PIL image, with which OpenAI's CLIP, the aesthetic
    predictor and ImageReward were trained. The offset of the crop is rounded half to even;
    transformers' CLIP processor rounds it down, which is a pixel apart on some oblong images.

    Args:
        image: an RGB image of any size.
        side: pixels of the result's side.

    Returns:
        Pixels (3, side, side) in [0, 1].
    """
    # The shortest side becomes `side`; the other is rounded down.
    shortest = min(image.size)
    width = side if image.width == shortest else int(side * image.width / shortest)
    height = side if image.height == shortest else int(side * image.height / shortest)
    resized = image
    if shortest != side:
        resized = image.resize((width, height), Image.Resampling.BICUBIC)

    top = round((height - side) / 2)
    left = round((width - side) / 2)
    pixels = torch.from_numpy(np.array(resized)[top : top + side, left : left + side])
    return pixels.permute(2, 0, 1).float() / 255


def normalise(pixels: Tensor) -> Tensor:
    """Subtract CLIP's mean and divide by CLIP's deviation.

    Args:
        pixels: (N, 3, H, W) in [0, 1].

    Returns:
        (N, 3, H, W).
    """
    mean = torch.tensor(MEAN).view(3, 1, 1)
    deviation = torch.tensor(DEVIATION).view(3, 1, 1)
    return (pixels - mean) / deviation


def clean_text(text: str) -> str:
    """Clean a prompt as open_clip's tokenizer does.

    Wrongly decoded characters are mended, HTML entities are unescaped twice, white space is
    collapsed, and letters become lower case.
    """
    mended = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", mended).strip().lower()
