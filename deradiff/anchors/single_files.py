"""A whole network from one safetensors file.

The file holds a denoiser, or a checkpoint with one, in its authors' layout or in diffusers'.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors.torch import load_file
from torch import nn

from deradiff.models.families import family_of_original
from deradiff.models.family import Family

PREFIX = "model.diffusion_model."
"""How the names of the denoiser's tensors begin in a checkpoint of the authors' layout."""


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
        file: the safetensors file.
        like: a network of the same architecture.
        dtype: precision of the weights.
        name: how an error names the anchor.

    Raises:
        ValueError: where the file does not hold all of such a network.
    """
    state = load_file(file)

    # diffusers knows the original layout of some networks only as a part of a checkpoint.
    family = original_family(state)
    is_bare = not any(key.startswith(PREFIX) for key in state)
    if is_bare and family and family.nested_original:
        state = {PREFIX + key: value for key, value in state.items()}
    try:
        with tempfile.TemporaryDirectory() as folder:
            like.save_config(folder)
            return type(like).from_single_file(state, config=folder, dtype=dtype)
    # torch's error for weights that are still on the meta device, because the file has none.
    except NotImplementedError as error:
        raise ValueError(
            f"{name} holds only a part of a {type(like).__name__} of the pipeline's size"
        ) from error
    except (SingleFileComponentError, ValueError, KeyError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} is no LoRA, and does not hold a {type(like).__name__} of the pipeline's size "
            f"({reason})"
        ) from error
