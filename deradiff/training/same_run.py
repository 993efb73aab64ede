"""Ranks that train together train the same: what each of them starts with is compared.

Gradients are averaged whatever they are gradients of, so that ranks with another beta, other data
or other weights would train on, and the card would tell what rank 0 had.
"""

from __future__ import annotations

import reprlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

REMEDY = "start every rank with the same command, data, models and packages"


def check_same(facts: Mapping[str, Any], accelerator: Accelerator, remedy: str = REMEDY) -> None:
    """Compare what all ranks say of their run; collective.

    Args:
        facts: of this rank, by what a message calls them.
        accelerator: of the run.
        remedy: what a message says to do.

    Raises:
        ValueError: on all ranks, where one says something else than rank 0.
    """
    if accelerator.num_processes == 1:
        return
    of_ranks = gather_object([dict(facts)])
    difference = first_difference(of_ranks)
    if difference is not None:
        raise ValueError(f"the ranks do not train the same: {difference}; {remedy}")


def first_difference(of_ranks: Sequence[Mapping[str, Any]]) -> str | None:
    """The first thing in which a rank differs from rank 0; None: there is none.

    Args:
        of_ranks: what each rank says.
    """
    first = of_ranks[0]
    for rank, facts in enumerate(of_ranks):
        for name in [*first, *(name for name in facts if name not in first)]:
            own = facts.get(name)
            # nan is not itself.
            if repr(own) != repr(first.get(name)):
                return (
                    f"{name} is {reprlib.repr(own)} on rank {rank} and "
                    f"{reprlib.repr(first.get(name))} on rank 0"
                )
    return None


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's values by their keys, such as `optim.lr`."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            values |= flattened(value, f"{key}.")
        else:
            values[key] = value
    return values


def weights_checksum(weights: Mapping[str, Tensor]) -> int:
    """A checksum of weights, as they are in memory.

    Args:
        weights: by name; whole tensors.
    """
    checksum = 0
    for name, tensor in sorted(weights.items()):
        checksum = zlib.crc32(name.encode(), checksum)
        flat = tensor.detach().cpu().contiguous().flatten()
        checksum = zlib.crc32(flat.view(torch.uint8).numpy().data, checksum)
    return checksum


def network_checksum(network: nn.Module) -> int:
    """A checksum of all weights of a network."""
    return weights_checksum(network.state_dict())
