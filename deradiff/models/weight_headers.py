"""What a file of weights says of itself before a tensor is read: whether it is whole, and how it is
stored."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from deradiff.text_files import LFS_POINTER

FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""Names of float8 in the header of a safetensors file."""

FLOAT8_SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale")
"""How the names of tensors end that belong to float8 weights with scales."""


def check_fetched(file: Path, name: str) -> None:
    """Check that a file is not what Git LFS leaves in its place.

    Args:
        file: the file.
        name: how an error names it.

    Raises:
        ValueError: for a pointer of Git LFS.
    """
    with open(file, "rb") as opened:
        is_pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
    if is_pointer:
        raise ValueError(
            f"{name} is a Git LFS pointer and not the weights ({file.name}): run git lfs pull in "
            "its folder"
        )


def check_whole(file: Path, name: str) -> None:
    """Check that a safetensors file is complete.

    Args:
        file: the file.
        name: how an error names it.

    Raises:
        ValueError: for a file that is torn or is something else.
    """
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{name} is no safetensors file that can be read ({file.name}: {short_reason(error)}): "
            "it is torn or something else, so fetch or copy it again"
        ) from error


def has_scaled_float8(file: Path) -> bool:
    """Whether a safetensors file holds float8 weights that are to be multiplied by scales.

    Without the scales, which diffusers does not know, they are other weights.

    Args:
        file: a complete safetensors file.
    """
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
        if not any(name.endswith(FLOAT8_SCALES) for name in names):
            return False
        return any(opened.get_slice(name).get_dtype() in FLOAT8 for name in names)


def short_reason(error: Exception) -> str:
    """An error's message on one line, cut where it is long."""
    return " ".join(str(error).split())[:120] or type(error).__name__
