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


def letterbox(image: Image.Image, side: int) -> Tensor:
    """Pixels (3, side, side) of an RGB picture, its longest side resized to `side`, the rest black; nothing is cropped.

    HPSv2's preparation (Wu et al. 2023, their `ResizeMaxSize`). Bicubic, antialiased, and not clamped: it overshoots [0, 1] at edges as
    theirs does. Theirs leaves an oblong picture whose longest side is already `side` unpadded, and fails; here it is padded too.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    scale = side / max(image.size)
    height, width = round(image.height * scale), round(image.width * scale)
    resized = F.interpolate(pixels[None], size=(height, width), mode="bicubic", antialias=True)[0]
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(resized, (left, side - width - left, top, side - height - top))


def clean_text(text: str) -> str:
    """The prompt as open_clip's tokenizer cleans it: mended mojibake, HTML entities (twice), white space collapsed, lower case."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip().lower()
