"""Which part of what a network computes is which branch of guidance.

A pipeline puts the branches into one batch, one block of rows after the other, or evaluates the
network for each. In what order is in its code alone. So each block is marked: a *probe*, which is 1
in one block and 0 in the others, goes through the guidance as the outputs do, and comes out as the
factor that guidance gives to that block. The factors of all branches add up to 1, or to -1 in a
pipeline that turns the sign, and the conditional branch is the one with the largest factor.

Shapes: rows of the denoiser's batch, in blocks of (images) rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deradiff.method.branches import BranchStrengths
from deradiff.method.lambdas import Strength
from deradiff.realignment.rows import lam_of_rows

MAX_BLOCKS = 4
"""The most blocks that are told apart within a step."""


def blocks_in(x: Any) -> int:
    """The number of blocks of rows in a network's input, by the latents that are repeated in it.

    Args:
        x: noisy latents (rows, ...), or a list of these. Channels behind the first one may hold
            something else, such as the image of an edit.
    """
    rows = len(x)
    for count in range(MAX_BLOCKS, 1, -1):
        if rows % count:
            continue
        size = rows // count
        if all(_same_latents(x[row], x[row % size]) for row in range(size, rows)):
            return count
    return 1


def _same_latents(row: Tensor, other: Tensor) -> bool:
    """Whether two rows hold the same noisy latents, by their first channel."""
    if row.ndim == 2:  # patches (L, channels)
        return torch.equal(row[:, :1], other[:, :1])
    return torch.equal(row[:1], other[:1])


def block_parts(
    reference: Tensor, anchors: Sequence[Tensor], block: range, owners: Sequence[int]
) -> list[Tensor]:
    """What goes through the guidance for each block: the anchors in it alone, and its probe.

    Args:
        reference: the reference's output (rows, ...).
        anchors: of each anchor, in the same shape.
        block: the numbers of the blocks that this evaluation has, within the step.
        owners: of each row, its place in `block`.

    Returns:
        For each of MAX_BLOCKS blocks a tensor for each anchor, then the probe.
    """
    numbers = torch.tensor([block[owner] for owner in owners], device=reference.device)
    parts = []
    for number in range(MAX_BLOCKS):
        is_inside = (numbers == number).view(-1, *[1] * (reference.ndim - 1))
        for anchor in anchors:
            parts.append(torch.where(is_inside, anchor, reference))
        parts.append(is_inside.to(reference.dtype).expand_as(reference).clone())
    return parts


def mixture_of_branches(
    reference: Tensor,
    parts: Sequence[Tensor],
    lams: Sequence[BranchStrengths | Strength],
    patch_size: int,
) -> Tensor:
    """The guided output with a lambda for each branch.

    Guidance is linear in the branches, or nearly so, and their shares add up.

    Args:
        reference: the guided output of the reference (images, ...).
        parts: what guidance made of `block_parts`.
        lams: of each anchor.
        patch_size: side of a patch, where the latents are patches.
    """
    size = len(lams) + 1
    factors = [float(parts[size * number + len(lams)].mean()) for number in range(MAX_BLOCKS)]
    if sum(factors) < 0:
        factors = [-factor for factor in factors]
    conditional = max(range(MAX_BLOCKS), key=factors.__getitem__)
    mixture = reference
    for number in range(MAX_BLOCKS):
        for anchor, lam in enumerate(lams):
            if isinstance(lam, BranchStrengths):
                lam = lam.conditional if number == conditional else lam.unconditional
            weight = lam_of_rows(lam, reference, patch_size)
            mixture = mixture + weight * (parts[size * number + anchor] - reference)
    return mixture
