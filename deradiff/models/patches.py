"""Latents in patches of 2 x 2, as FLUX.1, FLUX.2, Chroma and Qwen-Image read them.

Latents (B, C, H, W) become rows (B, H/2 * W/2, 4 C), and a row's numbers are sorted by channel,
then by their place in the patch. Beside it stands what else the networks of FLUX's kind get.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deradiff.models.family import Shapes, unwrapped

if TYPE_CHECKING:  # not imported when a command starts
    from torch import Tensor

PATCH = 2
"""Side of a patch of latents."""


def patch_grid(latents: Tensor) -> tuple[int, int]:
    """Rows and columns of the patches of latents (B, C, H, W)."""
    return latents.shape[2] // PATCH, latents.shape[3] // PATCH


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


def guidance_input(denoiser: Any, noisy: Tensor, scale: float) -> Tensor | None:
    """The guidance that a network of FLUX's kind gets in training.

    Args:
        denoiser: the network, possibly wrapped.
        noisy: noisy latents (B, C, H, W).
        scale: the guidance scale.

    Returns:
        (B,) in float32, or None for a network that was not distilled.
    """
    if not unwrapped(denoiser).config.guidance_embeds:
        return None
    return noisy.new_full((len(noisy),), scale).float()


def packed_shapes(
    config: Mapping[str, Any],
    height: int,
    width: int,
    tokens: int,
    coordinates: int,
    guidance: bool = False,
) -> Shapes:
    """Shapes of what a network of FLUX's kind gets for one image, besides the prompt.

    Args:
        config: the network's config.
        height: of the latents.
        width: of the latents.
        tokens: of the prompt.
        coordinates: numbers that say where a patch or a token lies.
        guidance: whether guidance is an input.

    Returns:
        `hidden_states` in patches, `timestep`, `img_ids`, `txt_ids`, and perhaps `guidance`.
    """
    patches = (height // PATCH) * (width // PATCH)
    shapes: Shapes = {
        "hidden_states": (1, patches, config["in_channels"]),
        "timestep": (1,),
        "img_ids": (patches, coordinates),
        "txt_ids": (tokens, coordinates),
    }
    if guidance:
        shapes["guidance"] = (1,)
    return shapes
