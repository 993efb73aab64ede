"""What happens to a picture and a prompt before CLIP sees them."""

from __future__ import annotations

import html
import re

import ftfy
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

MEAN, DEVIATION = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # of CLIP's training pictures


def letterbox(image: Image.Image, side: int) -> Tensor:
    """Pixels (3, side, side) of an RGB picture, its longest side resized to `side`, the rest black;
    nothing is cropped.

    HPSv2's preparation (Wu et al. 2023, their `ResizeMaxSize`). Bicubic, antialiased, and not
    clamped: it overshoots [0, 1] at edges as theirs does. Theirs leaves an oblong picture whose
    longest side is already `side` unpadded, and fails; here it is padded too.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    scale = side / max(image.size)
    height, width = round(image.height * scale), round(image.width * scale)
    resized = F.interpolate(pixels[None], size=(height, width), mode="bicubic", antialias=True)[0]
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(resized, (left, side - width - left, top, side - height - top))


def centre_crop(image: Image.Image, side: int) -> Tensor:
    """Pixels (3, side, side) in [0, 1] of an RGB picture, its shortest side resized to `side`,
    bicubic, the middle of the longer one.

    As torchvision's Resize and CenterCrop on a PIL picture, which OpenAI's CLIP, the aesthetic
    predictor and ImageReward were trained
    behind: the offset is rounded half to even, where transformers' CLIP processor rounds it down (a
        pixel apart on some oblong pictures).
    """
    scale = side / min(image.size)
    width, height = (
        side if length == min(image.size) else int(side * length / min(image.size))
        for length in image.size
    )
    resized = image.resize((width, height), Image.Resampling.BICUBIC) if scale != 1 else image
    top, left = round((height - side) / 2), round((width - side) / 2)
    pixels = torch.from_numpy(np.array(resized)[top : top + side, left : left + side])
    return pixels.permute(2, 0, 1).float() / 255


def normalised(pixels: Tensor) -> Tensor:
    """Pixels (N, 3, H, W) in [0, 1] less CLIP's mean, over CLIP's deviation."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (pixels - mean) / deviation


def clean_text(text: str) -> str:
    """The prompt as open_clip's tokenizer cleans it: mended mojibake, HTML entities (twice), white
    space collapsed, lower case."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip().lower()
