"""The embedded shapes world: captioned scenes of 32x32 pixels, and two rewards that are known in
closed form.

A caption names size, colour, shape and background. Saturation, brightness, edge softness, position
and tilt are *not* in the caption, so that a preference has something to choose among pictures that
all fit their prompt.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deradiff.image_tables import encode_png, write_pair_table, write_table

SIDE = 32
RADII = {"small": 7.5, "large": 11.2}  # pixels from the centre to the rim of the shape
HUES = {
    "red": 355.0,
    "orange": 26.0,
    "yellow": 54.0,
    "green": 125.0,
    "blue": 222.0,
    "purple": 285.0,
}  # degrees
SHAPES = ("circle", "square", "triangle", "cross", "ring")
BACKGROUNDS = {  # RGB; pale or neutral, so that no colour of a shape is ever near its background
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.06),
    "grey": (0.52, 0.52, 0.52),
    "pink": (0.97, 0.80, 0.87),
    "mint": (0.74, 0.93, 0.83),
}


@dataclass(frozen=True)
class Scene:
    """What a caption says. `str(scene)` is the caption."""

    size: str
    colour: str
    shape: str
    background: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"


SCENES = [Scene(*words) for words in itertools.product(RADII, HUES, SHAPES, BACKGROUNDS)]
CAPTIONS = [str(scene) for scene in SCENES]


def _held_out(caption: str) -> bool:
    return hashlib.sha256(caption.encode()).digest()[0] % 5 == 0


def training_captions() -> list[str]:
    """The captions that every model of the shapes world was trained on."""
    return [c for c in CAPTIONS if not _held_out(c)]


def held_out_captions() -> list[str]:
    """The captions, about one in five, that no model of the shapes world saw in training; reports
    are made on these."""
    return [c for c in CAPTIONS if _held_out(c)]


def scene_of(caption: str) -> Scene:
    """The scene that a caption describes. Raises ValueError for a text that is no caption of this
    world."""
    try:
        return SCENES[CAPTIONS.index(caption)]
    except ValueError:
        raise ValueError(
            f"{caption[:80]!r} is no caption of the shapes world, which vivid and crisp judge by "
            f"(one is {CAPTIONS[0]!r}): "
            "leave them away, as with scorers=[clip,pickscore], or sample captions"
        ) from None


def _hsv(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(N,) hue in degrees, saturation and value in [0, 1] -> RGB (N, 3)."""
    k = (np.array([5.0, 3.0, 1.0]) + hue[:, None] / 60) % 6
    return value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels to the rim of a shape of radius r at the origin, negative inside; y
    points down."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * r) - 0.26 * r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.86 * r
    if shape == "cross":
        return np.minimum(
            np.maximum(abs(x) - r, abs(y) - 0.32 * r), np.maximum(abs(x) - 0.32 * r, abs(y) - r)
        )
    side = np.maximum(
        np.sqrt(3) / 2 * abs(x) - y / 2, y
    )  # triangle: three half planes around the origin, tip up
    return side - 0.62 * r


def render(scenes: list[Scene], rng: np.random.Generator) -> np.ndarray:
    """Draw each scene once, its free attributes drawn from rng: uint8 (N, 32, 32, 3).

    Free attributes: saturation .4 to 1, brightness .75 to 1, edge width .7 to 4 pixels, centre
    within 3.5 pixels, tilt within 20 degrees.
    """
    n = len(scenes)
    saturation, value = rng.uniform(0.4, 1, n), rng.uniform(0.75, 1, n)
    width, tilt = (
        np.exp(rng.uniform(np.log(0.7), np.log(4.0), n)),
        np.deg2rad(rng.uniform(-20, 20, n)),
    )
    centre, shade = rng.uniform(-3.5, 3.5, (n, 2)), rng.uniform(-0.03, 0.03, n)
    colour = _hsv(np.array([HUES[s.colour] for s in scenes]), saturation, value)
    ground = np.array([BACKGROUNDS[s.background] for s in scenes]) + shade[:, None]
    grid = np.arange(SIDE) + 0.5 - SIDE / 2
    images = np.empty((n, SIDE, SIDE, 3))
    for i, scene in enumerate(scenes):
        x, y = grid[None, :] - centre[i, 0], grid[:, None] - centre[i, 1]
        x, y = np.cos(tilt[i]) * x + np.sin(tilt[i]) * y, np.cos(tilt[i]) * y - np.sin(tilt[i]) * x
        cover = np.clip(0.5 - _distance(scene.shape, x, y, RADII[scene.size]) / width[i], 0, 1)[
            ..., None
        ]
        images[i] = cover * colour[i] + (1 - cover) * ground[i]
    return (np.clip(images, 0, 1) * 255 + 0.5).astype(np.uint8)


def _pixels(images: list[Image.Image]) -> Tensor:
    """(N, 3, 32, 32) in [0, 1]."""
    arrays = [
        np.asarray(i.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for i in images
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def _foreground(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (N, 32, 32) of each pixel from the background, the median of the picture's rim, and
    a soft mask of what stands out."""
    rim = torch.cat(
        [pixels[..., 0, :], pixels[..., -1, :], pixels[..., :, 0], pixels[..., :, -1]], dim=-1
    )
    distance = (pixels - rim.median(dim=-1).values[..., None, None]).square().sum(1).sqrt()
    return distance, ((distance - 0.1) / 0.2).clamp(0, 1)


def vivid(images: list[Image.Image], prompts: list[str]) -> Tensor:
    """Reward A, (N,): mean chroma of the foreground along the hue that the prompt names,
    standardised over the world's renders."""
    pixels = _pixels(images)
    _, mask = _foreground(pixels)
    red, green, blue = pixels.unbind(1)
    chroma = torch.stack(
        [red - (green + blue) / 2, 3**0.5 / 2 * (green - blue)]
    )  # opponent plane: red axis, green-blue axis
    hue = torch.deg2rad(torch.tensor([HUES[scene_of(p).colour] for p in prompts]))
    along = chroma[0] * hue.cos()[:, None, None] + chroma[1] * hue.sin()[:, None, None]
    mean = (mask * along).sum((1, 2)) / (mask.sum((1, 2)) + 1)
    return (mean - 0.483) / 0.131


def crisp(images: list[Image.Image], prompts: list[str]) -> Tensor:
    """Reward B, (N,): steepness of the edges relative to the contrast, less the shape's distance
    from the centre; standardised."""
    distance, mask = _foreground(_pixels(images))
    gradient = torch.hypot(*torch.gradient(distance, dim=(1, 2)))
    steepness = (
        gradient.square().sum((1, 2))
        / (gradient.sum((1, 2)) + 1)
        / distance.amax((1, 2)).clamp(min=0.1)
    )
    grid = torch.arange(SIDE) + 0.5 - SIDE / 2
    mass = mask.sum((1, 2)) + 1
    offset = torch.hypot(
        (mask * grid).sum((1, 2)) / mass, (mask * grid[:, None]).sum((1, 2)) / mass
    )
    return ((steepness - 0.359) / 0.086 - (offset - 2.63) / 1.0) / 2**0.5


def write_images(path: Path, count: int, seed: int) -> None:
    """A parquet of captioned images (columns `image`, `caption`), captions from the training
    split."""
    rng = np.random.default_rng(seed)
    captions = [str(c) for c in rng.choice(training_captions(), count)]
    pictures = render([scene_of(c) for c in captions], rng)
    write_table(
        path, {"image": [encode_png(Image.fromarray(p)) for p in pictures], "caption": captions}
    )


def write_pairs(path: Path, count: int, seed: int, reward: str = "vivid") -> None:
    """A parquet of preference pairs in Pick-a-Pic's columns: two pictures of one caption and a
    Bradley-Terry label on a reward.

    p(image 0 is preferred) = sigmoid(2 (r_0 - r_1)); reward: `vivid` or `crisp`.
    """
    rng = np.random.default_rng(seed)
    captions = [str(c) for c in rng.choice(training_captions(), count)]
    scenes = [scene_of(c) for c in captions]
    sides = [render(scenes, rng), render(scenes, rng)]
    score = {"vivid": vivid, "crisp": crisp}[reward]
    r0, r1 = (score([Image.fromarray(p) for p in side], captions) for side in sides)
    first = rng.uniform(size=count) < torch.sigmoid(2 * (r0 - r1)).numpy()
    write_pair_table(
        path,
        [encode_png(Image.fromarray(p)) for p in sides[0]],
        [encode_png(Image.fromarray(p)) for p in sides[1]],
        first.astype(float).tolist(),
        captions,
    )
