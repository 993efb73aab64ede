"""Lambda of an image or a region, in the shape of what a network or a scheduler handles.

Shapes: rows of the denoiser's batch, images = rows / (evaluations in one batch for each image).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deradiff.method.lambdas import Strength, broadcast_to


def lam_of_rows(lam: Strength, output: Tensor, patch_size: int) -> Strength:
    """Lambda in a shape that broadcasts to a network's output or to latents.

    Every pipeline of diffusers that evaluates several rows for an image puts the same one of all
    images together: the unconditional rows of all images, then the conditional ones.

    Args:
        lam: a number, (images,), or a mask (H, W) or (images, H, W) over the latents.
        output: (rows, C, H, W), (rows, C, frames, H, W), or (rows, L, channels) of L patches.
        patch_size: side of a patch, where the output is one of patches.

    Raises:
        ValueError: where the images, or the sides of a mask, are not the output's.
    """
    if not isinstance(lam, Tensor):
        return lam
    rows = len(output)
    images = rows if lam.ndim == 2 else len(lam)
    if images == 0 or rows % images:
        raise ValueError(
            f"lam is of {images} images, and the pipeline evaluates {rows} rows: give a value, or "
            "a mask, for each image"
        )
    if lam.ndim > 1 and output.ndim == 5:
        of_a_frame = torch.as_tensor(broadcast_to(lam, output[:, :, 0], rows // images))
        return of_a_frame.unsqueeze(2)
    if lam.ndim > 1 and output.ndim == 3 and lam.shape[-1] * lam.shape[-2] == output.shape[1]:
        patch_size = 1
    return broadcast_to(lam, output, rows // images, patch_size)


def lam_of_row(lam: Strength, row: int) -> Strength:
    """Lambda of one row, where a network returns a list with a tensor for each.

    Args:
        lam: a number, (images,), or a mask (H, W) or (images, H, W) over the latents.
        row: its place in the batch.
    """
    if not isinstance(lam, Tensor) or lam.ndim == 2:
        return lam
    return lam[row % len(lam)].to(lam.device)


def check_images(lam: Strength, sample: Any) -> None:
    """Check that lambda is of as many images as the scheduler denoises.

    Args:
        lam: a number, (images,), or a mask.
        sample: the noisy latents (images, ...).

    Raises:
        ValueError: where it is of another number.
    """
    if not isinstance(lam, Tensor) or lam.ndim == 2 or not isinstance(sample, Tensor):
        return
    if len(lam) != len(sample):
        raise ValueError(
            f"lam is of {len(lam)} images and the pipeline samples {len(sample)}: give a value, or "
            "a mask, for each of them"
        )
