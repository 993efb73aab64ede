"""The memory that a network's evaluation needs at its peak, counted without its weights.

The network runs on the meta device, where tensors have shapes and no numbers, and each operation's
results are counted for as long as they are alive. Kernels' workspaces come on top.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deradiff.models.family import Family
from deradiff.models.requirements import fused_attention


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they are alive.

    Attributes:
        alive: bytes now.
        peak: the most bytes at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        # How many tensors share each storage.
        self._users: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do an operation, and count what it makes."""
        result = func(*args, **(kwargs or {}))
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf, is_new=_storage(leaf) not in given)
        self.peak = max(self.peak, self.alive)
        return result

    def _follow(self, tensor: Tensor, is_new: bool) -> None:
        """Count a tensor until it is gone; a view counts with what it is a view of."""
        storage = _storage(tensor)
        if storage not in self._users:
            if not is_new:
                return  # of a weight or an input
            self._users[storage] = 0
            self.alive += tensor.untyped_storage().nbytes()
        self._users[storage] += 1
        weakref.finalize(tensor, self._forget, storage, tensor.untyped_storage().nbytes())

    def _forget(self, storage: int, size: int) -> None:
        """A tensor is gone."""
        self._users[storage] -= 1
        if self._users[storage] == 0:
            del self._users[storage]
            self.alive -= size


def _storage(tensor: Tensor) -> int:
    """What tells the memory of a tensor from that of others."""
    return tensor.untyped_storage()._cdata


def encoding_bytes(family: Family, vae: Any, resolution: int, images: int) -> float:
    """Bytes that encoding images takes at its peak: the autoencoder's weights, and what it makes.

    Args:
        family: of the autoencoder.
        vae: the autoencoder on the meta device, in its precision.
        resolution: pixels of an image's side.
        images: that are encoded at once.
    """
    weights = sum(weight.untyped_storage().nbytes() for weight in vae.parameters())
    pixels = torch.empty(images, 3, resolution, resolution, device="meta", dtype=vae.dtype)
    counter = PeakMemory()
    with torch.no_grad(), fused_attention(), counter:
        family.encode_images(vae, pixels)
    return weights + pixels.untyped_storage().nbytes() + counter.peak
