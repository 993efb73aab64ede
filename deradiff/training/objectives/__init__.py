"""What can be trained: each objective holds its networks and turns examples into a loss; `deradiff.training.loop` does the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from deradiff.data.pairs import Item

Batch = dict[str, Any]


class Objective(Protocol):
    """network: the module that is trained (its parameters that require gradients). frozen: networks that only need a device."""

    @property
    def network(self) -> nn.Module: ...

    @property
    def frozen(self) -> list[nn.Module]: ...

    def collate(self, items: list[Item]) -> Batch:
        """Examples to CPU tensors; every random choice comes from the items' own generators."""

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, and scalars to log. `network` is `self.network` as accelerate wrapped it."""

    def save(self, run_dir: Path) -> Path:
        """Write what was trained, in the format that the next stage loads; returns its folder."""
