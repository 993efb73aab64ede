"""What a training run needs, known before it starts: FLOPs, hours, memory and disk.

All of it is counted on the denoiser's config; no weight is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from deradiff.models.flops import (
    denoiser_family,
    denoiser_flops,
    denoiser_inputs,
    dpo_step_flops,
    meta_denoiser,
)

UTILISATION = 0.4
"""Share of a GPU's peak, assumed; `python -m benchmarks.train` measures it on the GPU itself."""

HALF = 2
"""Bytes of a number in half precision."""

SINGLE = 4
"""Bytes of a number in single precision."""

OPTIMIZER_BYTES = {"adamw": 2 * SINGLE, "adamw8bit": 2}
"""Bytes of optimiser state for each trained number."""


@dataclass(frozen=True)
class Requirements:
    """What a run needs. Memory is in bytes on one device, without sharding.

    Attributes:
        parameters: numbers of the denoiser.
        trained: those of them, or of the LoRA, that are trained.
        flops: of the whole run, with recomputation.
        hours: device-hours at the assumed utilisation.
        weights: frozen ones in half precision, trained ones in single, and autocast's copies.
        gradients: of the trained weights.
        optimizer: its state.
        activations: what autograd keeps of one micro-batch for its backward, all of it in half
            precision. This is a lower bound: autocast keeps norms in single precision, and kernels'
            workspaces, the recomputation of one block and fragmentation come on top.
    """

    parameters: int
    trained: int
    flops: float
    hours: float
    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def memory(self) -> float:
        """Bytes on one device without sharding."""
        return self.weights + self.gradients + self.optimizer + self.activations


def dpo_requirements(
    config: Mapping[str, Any],
    height: int,
    width: int,
    steps: int,
    pairs: int,
    tflops: float,
    *,
    method: str = "full",
    optimizer: str = "adamw",
    checkpointing: bool = False,
    stored_reference: bool = False,
    batch: int = 1,
    tokens: int = 77,
    lora: Any = None,
    utilisation: float = UTILISATION,
) -> Requirements:
    """Requirements of Diffusion-DPO in mixed precision, latents and text embeddings cached.

    Args:
        config: of the denoiser.
        height: of the latents.
        width: of the latents.
        steps: optimiser steps.
        pairs: of one optimiser step.
        tflops: peak of a device, in 10^12 FLOP/s.
        method: `full` or `lora`.
        optimizer: `adamw`, `adafactor` (its second moment factored) or `adamw8bit`.
        checkpointing: gradient checkpointing.
        stored_reference: the reference's errors are known.
        batch: pairs of one micro-batch.
        tokens: of a prompt.
        lora: a peft LoraConfig, for method `lora`.
        utilisation: share of the peak that is reached.

    Raises:
        ValueError: for an unknown method or optimiser.
    """
    # The network, and what of it is trained
    network = meta_denoiser(config)
    parameters = sum(p.numel() for p in network.parameters())
    if method == "lora":
        network.requires_grad_(False)
        network.add_adapter(lora)
    trained = [p for p in network.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)

    # Arithmetic
    forward = denoiser_flops(config, height, width, tokens)
    flops = steps * dpo_step_flops(forward, pairs, method, checkpointing, stored_reference)
    hours = flops / (tflops * 1e12 * utilisation) / 3600

    # Memory. A LoRA's reference is the same network with the adapter off
    if method == "lora":
        weights = HALF * parameters + (HALF + SINGLE) * count
    else:
        reference = 0 if stored_reference else HALF * parameters
        weights = (HALF + SINGLE) * parameters + reference
    inputs = denoiser_inputs(network.config, height, width, tokens)
    kept = activation_bytes(network, inputs, checkpointing)
    return Requirements(
        parameters=parameters,
        trained=count,
        flops=flops,
        hours=hours,
        weights=weights,
        gradients=SINGLE * count,
        optimizer=optimizer_bytes([p.shape for p in trained], optimizer),
        activations=2 * batch * kept,
    )


def optimizer_bytes(shapes: list[torch.Size], optimizer: str) -> float:
    """Bytes of an optimiser's state for weights of these shapes. Raises ValueError if unknown."""
    if optimizer == "adafactor":
        return SINGLE * sum(_factored_size(shape) for shape in shapes)
    if optimizer not in OPTIMIZER_BYTES:
        raise ValueError(f"the optimizer must be adamw, adafactor or adamw8bit, not {optimizer!r}")
    return OPTIMIZER_BYTES[optimizer] * sum(shape.numel() for shape in shapes)


def _factored_size(shape: torch.Size) -> int:
    """Numbers of Adafactor's second moment: a row and a column for each matrix.

    Shazeer and Stern 2018, as transformers has it; there is no first moment.
    """
    if len(shape) < 2:
        return shape.numel()
    return shape.numel() // shape[-1] + shape.numel() // shape[-2]


class FusedAttention(torch.autograd.Function):
    """Stands for a fused attention kernel: it keeps query, key, value and its output."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        """An empty output of attention's shape."""
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


@contextmanager
def fused_attention() -> Iterator[None]:
    """torch's attention replaced by `FusedAttention`, which keeps no matrix of weights."""
    original = F.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return FusedAttention.apply(query, key, value)

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def activation_bytes(network: Any, inputs: dict[str, Any], checkpointing: bool) -> float:
    """Bytes that one image's forward keeps for the backward, in half precision, attention fused.

    Args:
        network: on the meta device.
        inputs: meta tensors by argument of its `forward`.
        checkpointing: gradient checkpointing.
    """
    # diffusers' own `to` would warn of modules that it keeps in single precision
    torch.nn.Module.to(network.train(), torch.bfloat16)
    if checkpointing:
        network.enable_gradient_checkpointing()
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def take(tensor: Any) -> Any:
        return tensor

    with fused_attention(), torch.autograd.graph.saved_tensors_hooks(keep, take):
        network(**_in_half_precision(inputs))
    return float(sum(kept.values()))


def _in_half_precision(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a network, with their tensors in half precision."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(torch.bfloat16), inputs)


def cache_bytes(
    config: Mapping[str, Any],
    height: int,
    width: int,
    images: int,
    captions: int,
    tokens: int = 77,
) -> float:
    """Disk, in bytes, of cached latents and text embeddings in half precision.

    Args:
        config: of the denoiser.
        height: of the latents.
        width: of the latents.
        images: latents that are cached.
        captions: captions whose embeddings are cached.
        tokens: of a caption.
    """
    # A config holds what differs from the class's defaults; a network of it holds everything
    config = meta_denoiser(config).config
    family = denoiser_family(config)
    inputs = denoiser_inputs(config, height, width, tokens)
    image = sum(tensor.numel() for tensor in tree_leaves(inputs[family.latents_argument]))
    prompt = sum(math.prod(shape) for shape in family.prompt_shapes(config, tokens).values())
    return HALF * (float(images) * image + float(captions) * prompt)
