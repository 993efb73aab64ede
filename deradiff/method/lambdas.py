"""Lambda as a number, a number per image, a mask over the latents, or a schedule over time: what a
dial may be turned to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

Strength = float | Tensor
"""A number; (images,), one per image; or (H, W) or (images, H, W), a mask over the latents. The
closed form holds for every element."""

Lambda = Strength | Callable[[float], Strength]
"""A strength, or a schedule: the strength at a fraction of time, 0 where the chain starts from pure
noise and 1 at the image."""


def ramp(start: float, end: float) -> Callable[[float], float]:
    """A schedule that goes from `start` at pure noise to `end` at the image, linearly in time."""
    return lambda fraction: start + fraction * (end - start)


def piecewise(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """A schedule of steps: points (fraction of time, lam), each valid until the next; the first
    fraction is 0.

    Raises ValueError for points that are not in order or do not start at 0.
    """
    fractions = [fraction for fraction, _ in points]
    if not points or fractions[0] != 0 or fractions != sorted(set(fractions)) or fractions[-1] > 1:
        raise ValueError(
            f"the fractions of a piecewise lam rise from 0 to at most 1, such as [(0, 1.0), "
            f"(0.5, 0.25)], not {points!r}"
        )
    return lambda fraction: next(lam for start, lam in reversed(points) if fraction >= start)


def value_at(lam: Lambda, fraction: float) -> Strength:
    """The strength that `lam` means at a fraction of time. Raises ValueError for a schedule's value
    that is none."""
    if isinstance(lam, Tensor) or not callable(lam):
        return lam
    value = validated(lam(fraction))
    if not isinstance(value, float | Tensor):
        raise ValueError(
            f"a schedule of lam returns numbers or tensors, and at {fraction:g} of the time it "
            f"returned {value!r}"
        )
    return value


def validated(lam: Lambda) -> Lambda:
    """`lam` itself, numbers as floats; ValueError for what is no strength and no schedule."""
    if callable(lam) and not isinstance(lam, Tensor):
        return lam
    if isinstance(lam, Tensor) and lam.ndim > 0:
        if (
            lam.ndim > 3
            or not lam.dtype.is_floating_point
            or not bool((lam.isfinite() & (lam >= 0)).all())
        ):
            said = f"{tuple(lam.shape)} {lam.dtype}"
            raise ValueError(
                f"a lam per image is (images,), a mask (H, W) or (images, H, W), of finite "
                f"floats from 0 up, not {said}"
            )
        return lam
    value = lam.item() if isinstance(lam, Tensor) else lam
    if (
        not isinstance(value, Real)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or value < 0
    ):
        raise ValueError(
            f"lam must be a finite number, 0 (the reference) or more (1: the anchor), not {lam!r}"
        )
    return float(value)


def broadcast_to(
    lam: Strength, output: Tensor, rows_per_image: int, patch_size: int = 1
) -> Strength:
    """`lam` in a shape that broadcasts to a denoiser's output.

    Args:
        lam: a number, (images,), or a mask (H, W) or (images, H, W) over the latents.
        output: (rows, C, H, W), or (rows, L, channels) of L patches of latents.
        rows_per_image: 2 with classifier-free guidance: the unconditional rows of all images, then
            the conditional ones; else 1.
        patch_size: side of a patch, where the output is one of patches.

    Raises:
        ValueError: where the images, or the sides of a mask, are not the output's.
    """
    if not isinstance(lam, Tensor):
        return lam
    lam = lam.to(output.device)
    rows = len(output)
    images = rows // rows_per_image
    is_per_image = lam.ndim != 2
    if is_per_image and len(lam) * rows_per_image != rows:
        raise ValueError(
            f"lam is of {len(lam)} images and the pipeline samples {images}: give a value, or a "
            "mask, for each of them"
        )
    if lam.ndim == 1:
        return lam.repeat(rows_per_image).view(rows, *[1] * (output.ndim - 1))
    masks = lam.expand(images, *lam.shape[-2:]).repeat(rows_per_image, 1, 1)
    if output.ndim == 3:
        return _in_patches(masks, output, patch_size)
    return _in_latents(masks, output)


def _in_latents(masks: Tensor, output: Tensor) -> Tensor:
    """Masks (rows, H, W) as (rows, 1, H, W)."""
    sides = output.shape[-2:]
    if masks.shape[-2:] != sides:
        raise ValueError(
            f"lam is a mask of {tuple(masks.shape[-2:])} over latents of {tuple(sides)}: resize it "
            "to the latents"
        )
    return masks.unsqueeze(1)


def _in_patches(masks: Tensor, output: Tensor, size: int) -> Tensor:
    """Masks (rows, H, W) as patches (rows, L, channels), channels before the places in a patch."""
    rows, patches, channels = output.shape
    height, width = masks.shape[-2:]
    elements = patches * size**2
    if height % size or width % size or height * width != elements:
        raise ValueError(
            f"lam is a mask of {height} x {width} over latents of {elements} elements: resize it "
            "to the latents"
        )
    squares = masks.view(rows, 1, height // size, size, width // size, size)
    squares = squares.expand(-1, channels // size**2, -1, -1, -1, -1)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(rows, patches, channels)


def trust_region(lam: Strength, divergence: Tensor, nats: float) -> Tensor:
    """lam > 1 shortened to where one step's overshoot, (lam - 1)^2 c |D|^2, is `nats` at most: 1 +
    min(lam - 1, sqrt(nats / (c |D|^2))).

    divergence: c |D|^2 = 1/2 L |D_eps|^2 of each image, in a shape that broadcasts with lam. A lam
        of at most 1 stays.
    """
    overshoot = torch.clamp(
        torch.as_tensor(lam, device=divergence.device) - 1,
        max=(nats / divergence.clamp(min=1e-12)).sqrt(),
    )
    return torch.where(
        overshoot > 0, 1 + overshoot, torch.as_tensor(lam, device=divergence.device)
    ).to(divergence.dtype)
