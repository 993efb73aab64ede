"""A whole network from one safetensors file: a denoiser, or a checkpoint that has one, in its authors' layout or diffusers'."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from deradiff.models.families import family_of_original
from deradiff.models.family import Family

PREFIX = "model.diffusion_model."  # of the denoiser in an original checkpoint


def original_family(keys: Iterable[str]) -> Family | None:
    """The family of a file in its authors' layout, by the names in it; None for other files."""
    return family_of_original(key.removeprefix(PREFIX) for key in keys)


def read_network(file: Path, like: Any, dtype: torch.dtype, named: str) -> nn.Module:
    """The network in a file, of the class and config of `like`, so that nothing is asked of the hub. named: the anchor, in errors.

    Raises ValueError, in one sentence, where the file does not hold all of such a network.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    state = load_file(file)
    family = original_family(state)
    is_bare = not any(key.startswith(PREFIX) for key in state)
    if is_bare and family and family.nested_original:
        state = {
            PREFIX + key: value for key, value in state.items()
        }  # diffusers knows a UNet's original layout as part of a checkpoint
    try:
        with tempfile.TemporaryDirectory() as folder:
            like.save_config(folder)
            return type(like).from_single_file(state, config=folder, dtype=dtype)
    except NotImplementedError as error:  # of torch, for weights that are still on the meta device
        raise ValueError(
            f"{named} holds only a part of a {type(like).__name__} of the pipeline's size"
        ) from error
    except (SingleFileComponentError, ValueError, KeyError, IndexError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{named} is no LoRA, and does not hold a {type(like).__name__} of the pipeline's size ({said})"
        ) from error
