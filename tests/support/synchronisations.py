"""Counts where a program would wait for a GPU, on a machine that has none."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
"""Operations whose result the host needs before it can go on."""


class Synchronisations(TorchDispatchMode):
    """Counts operations, and those that make the host wait for the device.

    Attributes:
        operations: how many there were.
        waits: how many of each kind waited.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation, and do it."""
        self.operations += 1
        name = func.overloadpacket.__name__
        # A mask as an index is counted first, and copied to where the numbers are read.
        is_mask = name in ("index", "index_put_") and any(map(_is_mask, args[1]))
        if name in READS or is_mask:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool
