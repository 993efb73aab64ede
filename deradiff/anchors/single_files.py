"""A whole network from one file.

The file holds a denoiser, or a checkpoint with one, in diffusers' layout or in its authors'. The
weights are of any precision; those of float8 are multiplied by their scales.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import SingleFileComponentError
from torch import Tensor, nn

from deradiff.anchors.float8 import plain_weights
from deradiff.anchors.weight_files import read_metadata, read_tensors
from deradiff.models.families import family_of_original
from deradiff.models.family import Family
from deradiff.models.single_files import DENOISER_PREFIX as PREFIX


def original_family(keys: Iterable[str]) -> Family | None:
    """The family of a file in its authors' layout; None for other files.

    Args:
        keys: the names of its tensors.
    """
    return family_of_original(key.removeprefix(PREFIX) for key in keys)


def read_network(file: Path, like: Any, dtype: torch.dtype, name: str) -> nn.Module:
    """Read the network in a file.

    It gets the class and config of another network, so that nothing is asked of the hub.

    Args:
        file: the file; a pickle is one that the user allows.
        like: a network of the same architecture.
        dtype: precision of the weights.
        name: how an error names the anchor.

    Raises:
        ValueError: where the file does not hold such a network, all of it and nothing else.
    """
    state = plain_weights(read_tensors(file, name), read_metadata(file), dtype, name)
    network = _empty_like(like)
    prefix = _prefix_of(state, network)
    if prefix is None:
        return _from_original(state, like, dtype, name)
    return _filled(network, state, prefix, dtype, name)


def _empty_like(like: Any) -> nn.Module:
    """A network of the same class and config, without weights (meta device)."""
    with init_empty_weights():
        return type(like).from_config(dict(like.config)).eval()


def _prefix_of(state: Mapping[str, Tensor], network: nn.Module) -> str | None:
    """What stands before diffusers' names in a file; None: its names are others.

    Scripts save a network alone (nothing), or as a part of something (`unet.`).
    """
    names = list(network.state_dict())
    # The longest name says most.
    longest = max(names, key=len)
    for key in state:
        prefix = key.removesuffix(longest)
        if key.endswith(longest) and all(prefix + name in state for name in names):
            return prefix
    return None


def _filled(
    network: nn.Module,
    state: Mapping[str, Tensor],
    prefix: str,
    dtype: torch.dtype,
    name: str,
) -> nn.Module:
    """The network with the weights of a file in diffusers' names."""
    own = network.state_dict()
    weights: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in state.items():
        ours = key.removeprefix(prefix)
        if ours in own and key.startswith(prefix):
            weights[ours] = _in_precision(value, ours, network, dtype)
        elif key.startswith(prefix):
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{name} holds {unknown[0]}, which no layer of the pipeline's "
            f"{type(network).__name__} has: give an anchor of its architecture"
        )
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"{name} is no LoRA, and does not hold a {type(network).__name__} of the "
                f"pipeline's size ({key} is {tuple(value.shape)}, the pipeline's is "
                f"{tuple(own[key].shape)})"
            )
    network.load_state_dict(weights, assign=True)
    return network


def _in_precision(value: Tensor, name: str, network: Any, dtype: torch.dtype) -> Tensor:
    """A weight in the wanted precision, or in float32 where the network's class asks for that."""
    kept_in_float32 = type(network)._keep_in_fp32_modules or ()
    if any(part in name.split(".") for part in kept_in_float32):
        dtype = torch.float32
    return value.to(dtype) if value.is_floating_point() else value


def _from_original(state: dict[str, Tensor], like: Any, dtype: torch.dtype, name: str) -> nn.Module:
    """The network of a file in its authors' layout, by diffusers' converters."""
    # diffusers knows the original layout of some networks only as a part of a checkpoint.
    family = original_family(state)
    is_bare = not any(key.startswith(PREFIX) for key in state)
    if is_bare and family and family.nested_original:
        state = {PREFIX + key: value for key, value in state.items()}
    numbers_in_file = _numbers_of_denoiser(state)
    wrong = f"{name} is no LoRA, and does not hold a {type(like).__name__} of the pipeline's size"
    if not hasattr(like, "from_single_file"):
        missing = sorted(like.state_dict().keys() - state.keys())
        raise ValueError(f"{wrong} in diffusers' names ({missing[0]} is missing)")
    try:
        with tempfile.TemporaryDirectory() as folder:
            like.save_config(folder)
            network = type(like).from_single_file(dict(state), config=folder, dtype=dtype)
    # torch's error for weights that are still on the meta device, because the file has none.
    except NotImplementedError as error:
        raise ValueError(
            f"{name} holds only a part of a {type(like).__name__} of the pipeline's size"
        ) from error
    except (SingleFileComponentError, ValueError, KeyError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{wrong} ({reason})") from error

    # What a converter does not know it drops, at most with a line in the log.
    numbers = sum(value.numel() for value in network.state_dict().values())
    if family and numbers_in_file > numbers:
        raise ValueError(
            f"{name} holds more than the pipeline's {type(like).__name__} "
            f"({numbers_in_file - numbers} numbers that it has no place for): give an anchor of "
            "its architecture"
        )
    return network


def _numbers_of_denoiser(state: Mapping[str, Tensor]) -> int:
    """How many numbers a file in the authors' layout holds of the denoiser."""
    is_checkpoint = any(key.startswith(PREFIX) for key in state)
    numbers = 0
    for key, value in state.items():
        if key.startswith(PREFIX) or not is_checkpoint:
            numbers += value.numel()
    return numbers
