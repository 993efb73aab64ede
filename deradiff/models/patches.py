"""Latents in patches of 2 x 2, as FLUX.1, FLUX.2, Chroma and Qwen-Image read them.

Latents (B, C, H, W) become rows (B, H/2 * W/2, 4 C), and a row's numbers are sorted by channel,
then by their place in the patch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not imported when a command starts
    from torch import Tensor

PATCH = 2
"""Side of a patch of latents."""


def pack(latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) as patches (B, H/2 * W/2, 4 C), channels first within a patch."""
    columns = latents.unflatten(3, (-1, PATCH))
    squares = columns.unflatten(2, (-1, PATCH))  # (B, C, H/2, 2, W/2, 2)
    channels = squares.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)  # (B, 4 C, H/2, W/2)
    return channels.flatten(2).transpose(1, 2)


def unpack(patches: Tensor, rows: int, columns: int) -> Tensor:
    """Patches (B, rows * columns, 4 C) as latents (B, C, 2 rows, 2 columns).

    The channels come last in memory, as `torch.nn.functional.pixel_shuffle` leaves them. The order
    in memory decides in which order a loss adds the elements, and so its last bits.
    """
    channels = patches.transpose(1, 2).unflatten(2, (rows, columns))  # (B, 4 C, rows, columns)
    squares = channels.unflatten(1, (-1, PATCH, PATCH))  # (B, C, 2, 2, rows, columns)
    lines = squares.permute(0, 4, 2, 5, 3, 1)  # (B, rows, 2, columns, 2, C)
    latents = lines.flatten(3, 4).flatten(1, 2)  # (B, 2 rows, 2 columns, C)
    return latents.permute(0, 3, 1, 2)


def patch_coordinates(like: Tensor, rows: int, columns: int, numbers: int = 3) -> Tensor:
    """Where each patch lies: its row and its column, after a number that is 0.

    Args:
        like: a tensor of the device and precision that is wanted.
        rows: of patches.
        columns: of patches.
        numbers: 3 for FLUX.1; FLUX.2 has a fourth, which is 0 for images.

    Returns:
        (rows * columns, numbers).
    """
    ids = like.new_zeros(rows, columns, numbers)
    ids[..., 1] = like.new_tensor(list(range(rows)))[:, None]
    ids[..., 2] = like.new_tensor(list(range(columns)))
    return ids.flatten(0, 1)
