"""The memory that a network needs at its peak, counted without its weights.

The network runs on tensors that have shapes and no numbers, and each operation's results are
counted for as long as they are alive: those of its forward, those that autograd keeps, and those of
its backward. Kernels' workspaces come on top.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from deradiff.models.family import Family

READS_DEVICE = torch.ops.prim.device.default
"""Makes no tensor, and is called more often than all others together."""


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
        self._followed: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do an operation, and count what it makes."""
        result = func(*args, **(kwargs or {}))
        if func is READS_DEVICE:
            return result
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            # What an operation was given and nobody made is a weight or an input.
            if isinstance(leaf, Tensor) and _storage(leaf) not in given:
                self._follow(leaf.untyped_storage())
        self.peak = max(self.peak, self.alive)
        return result

    def _follow(self, storage: Any) -> None:
        """Count a storage until it is gone: also where autograd alone still holds it."""
        key = storage._cdata
        if key not in self._followed:
            self._followed.add(key)
            self.alive += storage.nbytes()
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        """A storage is gone."""
        self._followed.discard(key)
        self.alive -= size


def _storage(tensor: Tensor) -> int:
    """What tells the memory of a tensor from that of others."""
    return tensor.untyped_storage()._cdata


# What a device would do, where tensors have no numbers.


class FusedAttention(torch.autograd.Function):
    """Stands for a fused attention kernel: it keeps query, key, value and its output."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        """An empty output of attention's shape."""
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Empty gradients of query, key and value."""
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def fused_attention(half: torch.dtype | None = None) -> Iterator[None]:
    """torch's attention replaced by `FusedAttention`, which keeps no matrix of weights.

    Args:
        half: the precision of autocast; None: there is none.
    """

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        if half is not None:
            query, key, value = query.to(half), key.to(half), value.to(half)
        return FusedAttention.apply(query, key, value)

    with _replaced("scaled_dot_product_attention", attention):
        yield


class Autocast:
    """torch's autocast, which does nothing to tensors on the meta device.

    Linear layers and convolutions are computed in half precision. On a GPU norms are in single
    precision; a CPU computes them in what they are given.

    Args:
        half: the precision.
        on_cuda: as on a GPU of CUDA, and not as on a CPU.

    Attributes:
        copies: of weights in half precision, by the weights' ids; kept until `forget` is called.
    """

    def __init__(self, half: torch.dtype, on_cuda: bool) -> None:
        self.half = half
        self.on_cuda = on_cuda
        self.copies: dict[int, Tensor] | None = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """The functions of `torch.nn.functional` replaced, for the length of a `with` block."""
        with ExitStack() as stack:
            for name in IN_HALF:
                stack.enter_context(_replaced(name, self._in_half(getattr(F, name))))
            for name in IN_SINGLE_ON_CUDA if self.on_cuda else ():
                stack.enter_context(_replaced(name, _in_single(getattr(F, name))))
            yield

    def forget(self) -> None:
        """The forward is over: its copies are given back, and no others are kept."""
        self.copies = None

    def _in_half(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def computed(*args: Any, **kwargs: Any) -> Tensor:
            args, kwargs = tree_map_only(Tensor, self._halved, (args, kwargs))
            return function(*args, **kwargs)

        return computed

    def _halved(self, tensor: Tensor) -> Tensor:
        is_weight = tensor.is_leaf and tensor.requires_grad
        if self.copies is None or not is_weight:
            return tensor.to(self.half)
        if id(tensor) not in self.copies:
            self.copies[id(tensor)] = tensor.to(self.half)
        return self.copies[id(tensor)]


IN_HALF = ("linear", "conv1d", "conv2d", "conv3d")
IN_SINGLE_ON_CUDA = ("layer_norm", "group_norm")


def _in_single(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def computed(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return function(*args, **kwargs)

    return computed


@contextmanager
def _replaced(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A function of `torch.nn.functional` replaced by another."""
    original = getattr(F, name)
    setattr(F, name, function)
    try:
        yield
    finally:
        setattr(F, name, original)


# What is counted.


def encoding_bytes(family: Family, vae: Any, resolution: int, images: int) -> float:
    """Bytes that encoding images takes at its peak, without the autoencoder's weights.

    Args:
        family: of the autoencoder.
        vae: the autoencoder on the meta device, in its precision.
        resolution: pixels of an image's side.
        images: that are encoded at once.
    """
    pixels = torch.empty(images, 3, resolution, resolution, device="meta", dtype=vae.dtype)
    counter = PeakMemory()
    with torch.no_grad(), fused_attention(), counter:
        family.encode_images(vae, pixels)
    return pixels.untyped_storage().nbytes() + counter.peak


def decoding_bytes(family: Family, vae: Any, resolution: int) -> float:
    """Bytes that decoding one image takes at its peak, without the autoencoder's weights.

    Args:
        family: of the autoencoder.
        vae: the autoencoder on the meta device, in its precision.
        resolution: pixels of the image's side.
    """
    counter = PeakMemory()
    overheard = _Overheard(vae)
    with torch.no_grad(), fused_attention():
        family.encode_images(overheard, torch.empty(1, 3, resolution, resolution, device="meta"))
        with counter:
            vae.decode(overheard.latents)
    return float(counter.peak)


class _Overheard:
    """An autoencoder that keeps the latents that it makes, in the shape that it decodes."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.latents: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)

    def encode(self, images: Tensor) -> Any:
        encoded = self.vae.encode(images)
        is_drawn = hasattr(encoded, "latent_dist")
        self.latents = encoded.latent_dist.mode() if is_drawn else encoded.latent
        return encoded


def forward_bytes(network: Any, inputs: dict[str, Any]) -> float:
    """Bytes that a forward without gradients takes at its peak, without the weights.

    Args:
        network: on the meta device, in its precision.
        inputs: meta tensors by argument of its `forward`.
    """
    counter = PeakMemory()
    dtype = next(network.parameters()).dtype
    arguments = tree_map_only(Tensor, lambda tensor: tensor.to(dtype), inputs)
    with torch.no_grad(), fused_attention(), counter:
        network(**arguments, return_dict=False)
    return float(counter.peak)


def weight_bytes(module: nn.Module) -> float:
    """Bytes of a network's weights."""
    return float(sum(weight.untyped_storage().nbytes() for weight in module.parameters()))


def backward_bytes(
    network: Any, inputs: dict[str, Any], half: torch.dtype | None, on_cuda: bool
) -> float:
    """Bytes that a forward and a backward take at their peak, without weights and gradients.

    These are what autograd keeps, autocast's copies of weights in half precision, and what is made
    on the way.

    Args:
        network: on the meta device, its weights in their precisions, in training mode.
        inputs: meta tensors by argument of its `forward`.
        half: the precision of autocast; None: there is none.
        on_cuda: as CUDA's autocast has it, and not that of CPUs.
    """
    # Gradients are there: micro-batches before this one have made them.
    for weight in network.parameters():
        if weight.requires_grad:
            weight.grad = torch.empty_like(weight)

    # The backward repeats a part of the forward where gradients are checkpointed.
    counter = PeakMemory()
    autocast = Autocast(half, on_cuda) if half is not None else None
    with fused_attention(half), autocast.active() if autocast else nullcontext(), counter:
        outputs = network(**inputs, return_dict=False)
        loss = sum(output.float().square().mean() for output in tree_leaves(outputs))
        del outputs
        if autocast:
            autocast.forget()
        loss.backward()
    return float(counter.peak)
