"""Weights of 8 bits (float8) as plain ones.

Three kinds of file are published:

- float8 without scales, as diffusers' layerwise casting saves it: the weight is what stands there;
- ComfyUI's scaled float8: `<layer>.scale_weight`, in newer files `<layer>.weight_scale`, and the
  weight is the product. The marker `scaled_fp8`, the notes `<layer>.comfy_quant` and the scales of
  a layer's *input*, which are for multiplying in 8 bits, say nothing of the weight;
- Black Forest Labs' `fp8r`: `<layer>.weight_scale` with a number for each row.

Scales of other shapes (blocks), and integers (int8, nvfp4), are refused: a guess would be a network
of other weights.

Shapes: weights (rows, ...); scales of one number, (rows,) or (rows, 1, ...).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SCALES = (".scale_weight", ".weight_scale")
"""How the name of a weight's scale ends, after that of its layer."""

INPUT_SCALES = (".scale_input", ".input_scale")
MARKER = "scaled_fp8"
NOTE = ".comfy_quant"
METADATA = "_quantization_metadata"
"""Where newer files of ComfyUI note the format of each layer, in their header."""

FORMATS = ("float8_e4m3fn", "float8_e5m2")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int8, torch.uint8)
OTHER_SCALES = (".weight_scale_2", ".weight_scale_inv", ".absmax", ".quant_map", ".weight_s_rel")
"""How names end that belong to other kinds of quantisation."""


def plain_weights(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype,
    name: str,
) -> dict[str, Tensor]:
    """The tensors of a file, with those of float8 multiplied by their scales.

    Args:
        state: the file's tensors.
        metadata: the texts in the file's header.
        dtype: what float8 weights become; products are made in float32.
        name: how an error names the anchor.

    Returns:
        The tensors without scales and notes; those that are not float8 are as they were.

    Raises:
        ValueError: for a quantisation of another kind.
    """
    _check_kind(state, metadata, name)
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        if _is_note(key, state):
            continue
        if value.dtype not in FLOAT8:
            plain[key] = value
            continue
        scale_key = _scale_key(key, state)
        if scale_key is None:
            plain[key] = value.to(dtype)
            continue
        scale = _fitting_scale(state[scale_key], value, scale_key, name)
        plain[key] = (value.float() * scale).to(dtype)
    return plain


def _scale_key(key: str, state: Mapping[str, Tensor]) -> str | None:
    """The name of a weight's scale; None: it has none."""
    layer, _, part = key.rpartition(".")
    if part != "weight":
        return None
    for ending in SCALES:
        if layer + ending in state:
            return layer + ending
    return None


def _is_note(key: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a tensor says something of a float8 weight, and is none itself."""
    if key.endswith((MARKER, NOTE)):
        return True
    for ending in (*SCALES, *INPUT_SCALES):
        weight = state.get(f"{key.removesuffix(ending)}.weight")
        if key.endswith(ending) and weight is not None:
            return weight.dtype in FLOAT8 or ending in INPUT_SCALES
    return False


def _check_kind(state: Mapping[str, Tensor], metadata: Mapping[str, str], name: str) -> None:
    """Raise ValueError where weights are quantised in a way that is not known here."""
    formats = _formats(state, metadata)
    for layer, layer_format in formats.items():
        if layer_format not in FORMATS:
            raise ValueError(_refusal(name, layer, f"as {layer_format}"))
    for key, value in state.items():
        if key.endswith(NOTE):
            continue
        if key.endswith(OTHER_SCALES):
            raise ValueError(_refusal(name, key, "in a way that deradiff does not know"))
        if value.dtype in INTEGERS and key.endswith("weight"):
            raise ValueError(_refusal(name, key, f"as {value.dtype}".replace("torch.", "")))
        if key.endswith(SCALES) and not _is_note(key, state):
            raise ValueError(_refusal(name, key, "with a scale that belongs to no float8 weight"))


def _formats(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """What ComfyUI notes of each layer: a format of FORMATS, or anything else."""
    notes: dict[str, Any] = {}
    for key, value in state.items():
        if key.endswith(NOTE):
            notes[key] = _parsed(bytes(value.flatten().tolist()))
    layers = _parsed(metadata.get(METADATA, "{}")).get("layers", {})
    notes.update(layers)
    formats = {}
    for layer, note in notes.items():
        is_rotated = bool(note.get("convrot"))
        formats[layer] = "rotated weights" if is_rotated else str(note.get("format"))
    return formats


def _parsed(text: str | bytes) -> dict[str, Any]:
    """The content of a JSON text; empty where it is none."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _fitting_scale(scale: Tensor, weight: Tensor, key: str, name: str) -> Tensor:
    """A scale as a factor of its weight: of no axes, or (rows, 1, ...)."""
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(())
    rows = weight.shape[0]
    is_by_row = scale.shape[0] == rows and scale.numel() == rows
    if not is_by_row:
        shape = tuple(scale.shape)
        raise ValueError(_refusal(name, key, f"with scales of shape {shape}, not one or one a row"))
    return scale.reshape(rows, *[1] * (weight.ndim - 1))


def _refusal(name: str, key: str, how: str) -> str:
    return (
        f"{name} is quantised {how} ({key}), which deradiff cannot undo: give the anchor in "
        "bfloat16 or float16, or in float8 with a scale for each layer"
    )
