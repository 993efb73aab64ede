"""What lambda may be: a number, a number for each image, a mask over the latents, or a schedule.

Shapes: outputs of a denoiser (rows, C, H, W), or (rows, L, channels) of L patches of latents;
rows = images * rows_per_image. A mask is (H, W) or (images, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

Strength = float | Tensor
"""The value of lambda at one moment.

A number; (images,), one for each image; or a mask over the latents. The closed form holds for each
element, so that lambda may differ between them.
"""

Lambda = Strength | Callable[[float], Strength]
"""A strength, or a schedule: a function from the fraction of time to a strength.

The fraction is 0 where the chain starts from pure noise, and 1 at the image.
"""

SMALLEST_DIVERGENCE = 1e-12
"""The trust region divides by the divergence, in nats; below this there is nothing to limit."""


def ramp(start: float, end: float) -> Callable[[float], float]:
    """A schedule that changes linearly in time.

    Args:
        start: lambda at pure noise.
        end: lambda at the image.

    Returns:
        The schedule, for `realign(pipe, anchor, lam=...)`.
    """

    def schedule(fraction: float) -> float:
        return start + fraction * (end - start)

    return schedule


def piecewise(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """A schedule that changes in steps.

    Args:
        points: (fraction of time, lambda) in the order of time, the first at fraction 0. Each
            lambda is valid until the next point.

    Returns:
        The schedule, for `realign(pipe, anchor, lam=...)`.

    Raises:
        ValueError: for fractions that do not rise from 0 to at most 1.
    """
    fractions = [fraction for fraction, _ in points]
    is_rising = fractions == sorted(set(fractions))
    if not points or fractions[0] != 0 or fractions[-1] > 1 or not is_rising:
        raise ValueError(
            "the fractions of a piecewise lam rise from 0 to at most 1, such as [(0, 1.0), "
            f"(0.5, 0.25)], not {points!r}"
        )

    def schedule(fraction: float) -> float:
        return next(lam for start, lam in reversed(points) if fraction >= start)

    return schedule


def value_at(lam: Lambda, fraction: float) -> Strength:
    """The value of lambda at a moment of the chain.

    Args:
        lam: a strength, or a schedule.
        fraction: of time, 0 at pure noise and 1 at the image.

    Raises:
        ValueError: for a schedule that returns something else than a strength.
    """
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
    """Lambda as it was passed, numbers as floats.

    Args:
        lam: what a user passed. What a schedule returns is checked by `value_at`.

    Raises:
        ValueError: for anything that is neither a strength nor a schedule: an infinite number, a
            tensor of integers, or one of another shape.
    """
    if isinstance(lam, Tensor) and lam.ndim > 0:
        _check_tensor(lam)
        return lam
    if callable(lam) and not isinstance(lam, Tensor):
        return lam
    value = lam.item() if isinstance(lam, Tensor) else lam
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(
            "lam must be a finite number such as 0 (the reference), 1 (the anchor) or one between, "
            f"not {lam!r}"
        )
    return float(value)


def _check_tensor(lam: Tensor) -> None:
    has_valid_form = lam.ndim <= 3 and lam.dtype.is_floating_point
    if not has_valid_form or not bool(lam.isfinite().all()):
        raise ValueError(
            "a lam per image is (images,), a mask (H, W) or (images, H, W), of finite floats, not "
            f"{tuple(lam.shape)} {lam.dtype}"
        )


def broadcast_to(
    lam: Strength, output: Tensor, rows_per_image: int, patch_size: int = 1
) -> Strength:
    """Lambda in a shape that broadcasts to a denoiser's output.

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

    # A number for each image becomes (rows, 1, ...), a mask (rows, H, W).
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
    """Masks (rows, H, W) as patches (rows, L, channels): by channel, then by place in a patch."""
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


def limit_lam(lam: Strength, divergence: Tensor, nats: float) -> Tensor:
    """Lower lambda to a trust region around the anchor.

    Beyond the anchor, a step's overshoot is a KL of (lam - 1)^2 c |D|^2 from the anchor's step. It
    is kept to `nats`:

        lam = 1 + min(lam - 1, sqrt(nats / (c |D|^2)))

    Args:
        lam: a number, or a tensor that broadcasts to `divergence`. Values of at most 1 stay.
        divergence: c |D|^2 = 1/2 L |D_eps|^2 of each image (see `transitions.kl_factors`), in a
            shape that broadcasts to a denoiser's output.
        nats: the largest overshoot of this step.

    Returns:
        Lambda in the shape and precision of `divergence`.
    """
    lam = torch.as_tensor(lam, device=divergence.device)
    largest = (nats / divergence.clamp(min=SMALLEST_DIVERGENCE)).sqrt()
    overshoot = torch.clamp(lam - 1, max=largest)
    limited = torch.where(overshoot > 0, 1 + overshoot, lam)
    return limited.to(divergence.dtype)
