"""Counts what ranks say to each other."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Counts collective operations.

    Attributes:
        calls: how many of each kind there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a collective, and do it."""
        if func.namespace.startswith("c10d") or func.namespace.startswith("_c10d"):
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
