"""The embedded shapes world: captioned scenes of 32x32 pixels, and two rewards in closed form.

A caption names size, colour, shape and background. Saturation, brightness, softness of the edge,
position and tilt are *not* in the caption, so that a preference has something to choose among
images that all fit their prompt.

Shapes: N images of H = W = 32 pixels. Arrays of pixels are (N, H, W, 3), tensors (N, 3, H, W); the
y axis points down.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deradiff.image_tables import encode_png, write_pair_table, write_table

SIDE = 32
"""Pixels of an image's side."""

RADII = {"small": 7.5, "large": 11.2}
"""Pixels from a shape's centre to its rim, by the word of the caption."""

HUES = {
    "red": 355.0,
    "orange": 26.0,
    "yellow": 54.0,
    "green": 125.0,
    "blue": 222.0,
    "purple": 285.0,
}
"""Degrees on the colour circle."""

SHAPES = ("circle", "square", "triangle", "cross", "ring")

BACKGROUNDS = {
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.06),
    "grey": (0.52, 0.52, 0.52),
    "pink": (0.97, 0.80, 0.87),
    "mint": (0.74, 0.93, 0.83),
}
"""RGB in [0, 1]; pale or neutral, so that no colour of a shape is near its background."""


@dataclass(frozen=True)
class Scene:
    """What a caption says; `str(scene)` is the caption.

    Attributes:
        size: a key of `RADII`.
        colour: a key of `HUES`.
        shape: one of `SHAPES`.
        background: a key of `BACKGROUNDS`.
    """

    size: str
    colour: str
    shape: str
    background: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"


SCENES = [Scene(*words) for words in itertools.product(RADII, HUES, SHAPES, BACKGROUNDS)]
CAPTIONS = [str(scene) for scene in SCENES]


def _is_held_out(caption: str) -> bool:
    """About one caption in five, by a digest of its words."""
    return hashlib.sha256(caption.encode()).digest()[0] % 5 == 0


def training_captions() -> list[str]:
    """The captions on which every model of the shapes world was trained."""
    return [caption for caption in CAPTIONS if not _is_held_out(caption)]


def held_out_captions() -> list[str]:
    """The captions, about one in five, that no model of the shapes world saw in training.

    Reports are made on these.
    """
    return [caption for caption in CAPTIONS if _is_held_out(caption)]


def scene_of(caption: str) -> Scene:
    """The scene that a caption describes.

    Raises:
        ValueError: for a text that is no caption of this world.
    """
    try:
        return SCENES[CAPTIONS.index(caption)]
    except ValueError:
        raise ValueError(
            f"{caption[:80]!r} is no caption of the shapes world (one is {CAPTIONS[0]!r})"
        ) from None


def rgb_of_hsv(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Convert colours from HSV to RGB.

    Args:
        hue: (N,), degrees.
        saturation: (N,), in [0, 1].
        value: (N,), in [0, 1].

    Returns:
        RGB (N, 3), in [0, 1].
    """
    # A channel falls from the value where its sector is between 0 and 4 (in units of 60 degrees).
    sector = (np.array([5.0, 3.0, 1.0]) + hue[:, None] / 60) % 6
    fall = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return value[:, None] * (1 - saturation[:, None] * fall)


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Pixels from a point to the rim of a shape at the origin, negative inside it."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.26 * radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.86 * radius
    if shape == "cross":
        arm = 0.32 * radius
        horizontal = np.maximum(abs(x) - radius, abs(y) - arm)
        vertical = np.maximum(abs(x) - arm, abs(y) - radius)
        return np.minimum(horizontal, vertical)
    # A triangle, tip up: three half planes around the origin.
    slopes = np.sqrt(3) / 2 * abs(x) - y / 2
    return np.maximum(slopes, y) - 0.62 * radius


def render(scenes: list[Scene], rng: np.random.Generator) -> np.ndarray:
    """Draw each scene once, with the attributes that its caption leaves open at random.

    These are: saturation 0.4 to 1, brightness 0.75 to 1, width of the edge 0.7 to 4 pixels, tilt
    within 20 degrees, centre within 3.5 pixels, shade of the background within 0.03.

    Args:
        scenes: N scenes.
        rng: of the open attributes.

    Returns:
        uint8 (N, 32, 32, 3).
    """
    # The open attributes. The order of the draws belongs to the world: it decides the images.
    count = len(scenes)
    saturation = rng.uniform(0.4, 1, count)
    value = rng.uniform(0.75, 1, count)
    edge_width = np.exp(rng.uniform(np.log(0.7), np.log(4.0), count))
    tilt = np.deg2rad(rng.uniform(-20, 20, count))
    centre = rng.uniform(-3.5, 3.5, (count, 2))
    shade = rng.uniform(-0.03, 0.03, count)

    # Colours, (N, 3).
    hue = np.array([HUES[scene.colour] for scene in scenes])
    colour = rgb_of_hsv(hue, saturation, value)
    ground = np.array([BACKGROUNDS[scene.background] for scene in scenes]) + shade[:, None]

    # Each pixel is the shape's colour by the share of it that the shape covers.
    grid = _pixel_centres()
    images = np.empty((count, SIDE, SIDE, 3))
    for i, scene in enumerate(scenes):
        x = grid[None, :] - centre[i, 0]
        y = grid[:, None] - centre[i, 1]
        cos = np.cos(tilt[i])
        sin = np.sin(tilt[i])
        distance = _signed_distance(
            scene.shape, cos * x + sin * y, cos * y - sin * x, RADII[scene.size]
        )
        cover = np.clip(0.5 - distance / edge_width[i], 0, 1)[..., None]
        images[i] = cover * colour[i] + (1 - cover) * ground[i]
    return (np.clip(images, 0, 1) * 255 + 0.5).astype(np.uint8)


def _pixel_centres() -> np.ndarray:
    """Coordinates (32,) of the pixels' centres along one axis, 0 in the middle of the image."""
    return np.arange(SIDE) + 0.5 - SIDE / 2


def _pixels(images: list[Image.Image]) -> Tensor:
    """Pixels (N, 3, 32, 32) in [0, 1] of N images of any size and mode."""
    arrays = []
    for image in images:
        resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        arrays.append(np.asarray(resized))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def _foreground(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What stands out from the background, the median of the pixels at an image's border.

    Args:
        pixels: (N, 3, 32, 32) in [0, 1].

    Returns:
        The distance in RGB of each pixel from the background, (N, 32, 32), and a soft mask of the
        foreground, (N, 32, 32) in [0, 1].
    """
    top = pixels[..., 0, :]
    bottom = pixels[..., -1, :]
    left = pixels[..., :, 0]
    right = pixels[..., :, -1]
    border = torch.cat([top, bottom, left, right], dim=-1)  # (N, 3, 128)
    background = border.median(dim=-1).values[..., None, None]
    distance = (pixels - background).square().sum(1).sqrt()
    mask = ((distance - 0.1) / 0.2).clamp(0, 1)
    return distance, mask


def vivid(images: list[Image.Image], prompts: list[str]) -> Tensor:
    """Reward A: how much of the colour that the prompt names the foreground has.

    It is the mean chroma along the named hue, standardised over the world's renders.

    Args:
        images: N images.
        prompts: N captions of this world.

    Returns:
        Rewards (N,).

    Raises:
        ValueError: for a prompt that is no caption of this world.
    """
    pixels = _pixels(images)
    _, mask = _foreground(pixels)

    # The opponent plane: its axes are red, and green against blue.
    red, green, blue = pixels.unbind(1)
    to_red = red - (green + blue) / 2
    to_green = 3**0.5 / 2 * (green - blue)

    # Chroma along the named hue, averaged over the foreground.
    degrees = [HUES[scene_of(prompt).colour] for prompt in prompts]
    hue = torch.deg2rad(torch.tensor(degrees))
    along = to_red * hue.cos()[:, None, None] + to_green * hue.sin()[:, None, None]
    mean = (mask * along).sum((1, 2)) / (mask.sum((1, 2)) + 1)

    # The mean and the standard deviation of that over the renders.
    return (mean - 0.483) / 0.131


def crisp(images: list[Image.Image], prompts: list[str]) -> Tensor:
    """Reward B: how sharp the edges are, less how far the shape is from the centre.

    Both parts are standardised over the world's renders.

    Args:
        images: N images.
        prompts: N prompts, which are not read.

    Returns:
        Rewards (N,).
    """
    distance, mask = _foreground(_pixels(images))

    # Steepness of the edges: the mean gradient, weighted by itself, over the contrast.
    gradient = torch.hypot(*torch.gradient(distance, dim=(1, 2)))
    mean_gradient = gradient.square().sum((1, 2)) / (gradient.sum((1, 2)) + 1)
    contrast = distance.amax((1, 2)).clamp(min=0.1)
    steepness = mean_gradient / contrast

    # Pixels from the centre of the image to the centre of the foreground.
    grid = torch.from_numpy(_pixel_centres()).float()
    mass = mask.sum((1, 2)) + 1
    x = (mask * grid).sum((1, 2)) / mass
    y = (mask * grid[:, None]).sum((1, 2)) / mass
    offset = torch.hypot(x, y)

    # The means and the standard deviations of both over the renders.
    return ((steepness - 0.359) / 0.086 - (offset - 2.63) / 1.0) / 2**0.5


def write_images(path: Path, count: int, seed: int) -> None:
    """Write captioned images, their captions drawn from the training captions.

    Args:
        path: a parquet file with the columns `image` and `caption`.
        count: images to draw.
        seed: of captions and images.
    """
    rng = np.random.default_rng(seed)
    captions = _draw_captions(count, rng)
    images = render([scene_of(caption) for caption in captions], rng)
    write_table(path, {"image": _encode(images), "caption": captions})


def write_pairs(
    path: Path, count: int, seed: int, reward: str | Mapping[str, float] = "vivid"
) -> None:
    """Write preference pairs: two images of one caption, labelled by a Bradley-Terry draw.

    The first image is preferred with probability sigmoid(2 (r_0 - r_1)).

    Args:
        path: a parquet file with Pick-a-Pic's columns.
        count: pairs to draw.
        seed: of captions, images and labels.
        reward: `vivid` or `crisp`; or the weights of both, whose weighted sum is then r.
    """
    rng = np.random.default_rng(seed)
    captions = _draw_captions(count, rng)
    scenes = [scene_of(caption) for caption in captions]
    first = render(scenes, rng)
    second = render(scenes, rng)

    weights = {reward: 1.0} if isinstance(reward, str) else reward
    difference = torch.zeros(count)
    for name, weight in weights.items():
        reward_of = {"vivid": vivid, "crisp": crisp}[name]
        rewards = [_rewards(reward_of, images, captions) for images in (first, second)]
        difference += weight * (rewards[0] - rewards[1])
    first_is_preferred = rng.uniform(size=count) < torch.sigmoid(2 * difference).numpy()

    labels = first_is_preferred.astype(float).tolist()
    write_pair_table(path, _encode(first), _encode(second), labels, captions)


def _draw_captions(count: int, rng: np.random.Generator) -> list[str]:
    return [str(caption) for caption in rng.choice(training_captions(), count)]


def _rewards(
    reward_of: Callable[[list[Image.Image], list[str]], Tensor],
    images: np.ndarray,
    captions: list[str],
) -> Tensor:
    return reward_of([Image.fromarray(image) for image in images], captions)


def _encode(images: np.ndarray) -> list[bytes]:
    return [encode_png(Image.fromarray(image)) for image in images]
