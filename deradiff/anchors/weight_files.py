"""Files of tensors, read into tensors by name, and what can be wrong with such a file.

safetensors files are read without more ado. A pickle (`.pth`, `.pt`, `.bin`, `.ckpt`) can run code
when it is opened, so it is read only where the user allows it, and by torch's `weights_only`
reader, which builds tensors and nothing else.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from deradiff.anchors.layer_settings import LARGEST
from deradiff.models.weight_headers import check_fetched, check_whole, short_reason

SAFETENSORS = ".safetensors"
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
"""How the names of files end that torch.save writes."""

STATE_NAMES = ("state_dict", "model_state_dict", "model", "module")
"""Under what names training scripts keep the weights in a checkpoint."""

WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""What DDP and torch.compile put before the names of all tensors."""


PICKLES_ARGUMENT = "load_anchor(..., read_pickled_tensors=True)"
"""What allows pickles, as an error names it."""


def is_pickle(file: str) -> bool:
    """Whether a file of this name is one of torch.save's."""
    return file.endswith(PICKLES)


def is_weights(file: str) -> bool:
    """Whether a file of this name can hold weights."""
    return file.endswith((SAFETENSORS, *PICKLES))


def check_pickle_allowed(file: str, name: str, pickles_allowed: bool) -> None:
    """Check that a file may be read.

    Args:
        file: its name.
        name: how an error names the anchor.
        pickles_allowed: whether the user allows pickles.

    Raises:
        ValueError: for a pickle that the user has not allowed.
    """
    if is_pickle(file) and not pickles_allowed:
        raise ValueError(
            f"{name} is a pickle ({Path(file).name}), and safetensors alone are read unless you "
            f"say otherwise: give {PICKLES_ARGUMENT}, which reads its tensors and runs no code "
            "of it"
        )


def check_readable(file: Path, name: str) -> None:
    """Check that a file is one of weights, and is complete. No tensor is read.

    Args:
        file: the file.
        name: how an error names the anchor.

    Raises:
        ValueError: for a pointer of Git LFS, and for a safetensors file that is torn or is
            something else.
    """
    check_fetched(file, name)
    if not is_pickle(file.name):
        check_whole(file, name)


def read_names(file: Path, name: str) -> list[str]:
    """The names of the tensors in a file. Of a safetensors file no tensor is read.

    Args:
        file: the file; a pickle is one that the user allows.
        name: how an error names the anchor.

    Raises:
        ValueError: for a file that cannot be read.
    """
    if is_pickle(file.name):
        return list(read_tensors(file, name))
    check_readable(file, name)
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def read_metadata(file: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file; empty for a pickle, which has none."""
    if is_pickle(file.name):
        return {}
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


def read_tensors(file: Path, name: str) -> dict[str, Tensor]:
    """The tensors in a file, on the CPU.

    Args:
        file: the file; a pickle is one that the user allows.
        name: how an error names the anchor.

    Raises:
        ValueError: for a file that cannot be read, or holds more than tensors.
    """
    check_readable(file, name)
    if not is_pickle(file.name):
        return load_file(file)
    return _without_wrapper(_state_of(_unpickled(file, name), name))


def check_values(tensors: Mapping[str, Tensor], name: str) -> None:
    """Check that weights are numbers that a network can have.

    Args:
        tensors: by name.
        name: how an error names the anchor.

    Raises:
        ValueError: for NaN, for infinity, and for more than float16 can hold.
    """
    for key, value in tensors.items():
        if not value.is_floating_point() or value.numel() == 0:
            continue
        for extreme in torch.aminmax(value):
            if not abs(float(extreme)) <= LARGEST:
                raise ValueError(
                    f"{name} holds {float(extreme):g} ({key}), which no network's weight is: it is "
                    "damaged, or its training overflowed, so give another"
                )


def _unpickled(file: Path, name: str) -> Any:
    """The content of a file of torch.save, of which tensors and plain containers are built."""
    try:
        # Files older than torch 1.6 are no zip files, and cannot be mapped.
        is_mapped = zipfile.is_zipfile(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    except UnpicklingError as error:
        raise ValueError(
            f"{name} holds more than tensors, and nothing else is unpickled: save the state_dict "
            "of its network as safetensors"
        ) from error
    # The reader fails with whatever a torn file leads it to.
    except Exception as error:
        reason = short_reason(error)
        raise ValueError(
            f"{name} is no file of torch.save that can be read ({file.name}: {reason}): it is torn "
            "or something else, so fetch or copy it again"
        ) from error


def _state_of(content: Any, name: str) -> dict[str, Tensor]:
    """The tensors by name in a checkpoint, which may keep them under a name of its own."""
    if _is_state(content):
        return dict(content)
    states: dict[str, Any] = {}
    if isinstance(content, Mapping):
        states = {key: value for key, value in content.items() if _is_state(value)}
    for key in STATE_NAMES:
        if key in states:
            return dict(states[key])
    if len(states) == 1:
        return dict(next(iter(states.values())))
    if states:
        found = ", ".join(sorted(map(str, states)))
        raise ValueError(
            f"{name} holds several sets of weights ({found}): save the one that is meant as "
            "safetensors"
        )
    raise ValueError(f"{name} holds no tensors by name: save its network's state_dict")


def _is_state(content: Any) -> bool:
    """Whether this is nothing but tensors by name."""
    if not isinstance(content, Mapping) or not content:
        return False
    named = (isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    return all(named)


def _without_wrapper(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what wrappers of the network put before all names."""
    for prefix in WRAPPER_PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
