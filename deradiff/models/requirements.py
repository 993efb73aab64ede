"""What a training run needs, known before it starts: FLOPs, hours, memory and disk.

All of it is counted on the denoiser's config; no weight is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from deradiff.models.flops import (
    denoiser_family,
    denoiser_flops,
    denoiser_inputs,
    dpo_step_flops,
    meta_denoiser,
)
from deradiff.models.peak_memory import backward_bytes, weight_bytes

HALF = 2
"""Bytes of a number in half precision."""

SINGLE = 4
"""Bytes of a number in single precision."""

OPTIMIZER_BYTES = {"adamw": 2 * SINGLE, "adamw8bit": 2}
"""Bytes of optimiser state for each trained number."""

CUDA_OVERHEAD = 1e9
"""Bytes of a GPU beside the tensors, assumed: CUDA's context, workspaces, and gaps between tensors.

A context alone has 0.3 to 0.6 GB.
"""


@dataclass(frozen=True)
class Requirements:
    """What a run needs. Memory is in bytes on one device, without sharding.

    Attributes:
        parameters: numbers of the denoiser.
        trained: those of them, or of the LoRA, that are trained.
        flops: of the whole run, with recomputation.
        useful: of the whole run, without recomputation.
        weights: of the denoiser, trained ones in single precision.
        reference: of the frozen copy that a full fine-tune keeps.
        gradients: of the trained weights.
        optimizer: its state.
        average: the moving average of the trained weights.
        activations: what forward and backward of one micro-batch make at their peak, and autocast's
            copies of weights.
        update: what the optimiser makes on the way to new weights.
    """

    parameters: int
    trained: int
    flops: float
    useful: float
    weights: float
    reference: float
    gradients: float
    optimizer: float
    average: float
    activations: float
    update: float

    @property
    def held(self) -> float:
        """Bytes on one device between two steps."""
        return self.weights + self.reference + self.optimizer + self.average

    @property
    def memory(self) -> float:
        """Bytes on one device at the peak of a step, without CUDA's own."""
        return self.held + self.gradients + max(self.activations, self.update)

    @property
    def checkpoint(self) -> float:
        """Bytes of one checkpoint on the disk."""
        return SINGLE * self.trained + self.average + self.optimizer

    def hours(self, tflops: float, utilisation: float) -> float:
        """Device-hours of the run.

        Args:
            tflops: peak of a device, in 10^12 FLOP/s.
            utilisation: share of the peak that is reached, recomputation not counted.
        """
        return self.useful / (tflops * 1e12 * utilisation) / 3600


def dpo_requirements(
    config: Mapping[str, Any],
    height: int,
    width: int,
    steps: int,
    pairs: int,
    *,
    method: str = "full",
    optimizer: str = "adamw",
    checkpointing: bool = False,
    stored_reference: bool = False,
    batch: int = 1,
    tokens: int = 77,
    lora: Any = None,
    average: bool = False,
    half: torch.dtype | None = torch.bfloat16,
    on_cuda: bool = True,
) -> Requirements:
    """Requirements of Diffusion-DPO, latents and text embeddings cached.

    Args:
        config: of the denoiser.
        height: of the latents.
        width: of the latents.
        steps: optimiser steps.
        pairs: of one optimiser step.
        method: `full` or `lora`.
        optimizer: `adamw`, `adafactor` (its second moment factored) or `adamw8bit`.
        checkpointing: gradient checkpointing.
        stored_reference: the reference's errors are known.
        batch: pairs of one micro-batch.
        tokens: of a prompt.
        lora: a peft LoraConfig, for method `lora`.
        average: a moving average of the weights is kept.
        half: the precision of frozen weights and of autocast; None: single precision throughout.
        on_cuda: on a GPU of CUDA, and not on a CPU.

    Raises:
        ValueError: for an unknown method or optimiser.
    """
    # The network, and what of it is trained
    network = meta_denoiser(config).train()
    parameters = sum(p.numel() for p in network.parameters())
    network.requires_grad_(method == "full")
    reference = 0.0
    if method == "full" and not stored_reference:
        reference = _reference_bytes(network, half)
    if method == "lora":
        # diffusers' own `to` would warn of modules that it keeps in single precision
        nn.Module.to(network, half or torch.float32)
        network.add_adapter(lora)
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    count = sum(p.numel() for p in trained)

    # Arithmetic
    forward = denoiser_flops(config, height, width, tokens)
    flops = steps * dpo_step_flops(forward, pairs, method, checkpointing, stored_reference)
    useful = steps * dpo_step_flops(forward, pairs, method, stored_reference=stored_reference)

    # Memory
    weights = weight_bytes(network)
    shapes = [p.shape for p in trained]
    if checkpointing:
        network.enable_gradient_checkpointing()
    inputs = denoiser_inputs(network.config, height, width, tokens, images=2 * batch)
    return Requirements(
        parameters=parameters,
        trained=count,
        flops=flops,
        useful=useful,
        weights=weights,
        reference=reference,
        gradients=SINGLE * count,
        optimizer=optimizer_bytes(shapes, optimizer),
        average=SINGLE * count * average,
        activations=backward_bytes(network, inputs, half, on_cuda),
        update=update_bytes(shapes, optimizer, on_cuda),
    )


def _reference_bytes(network: Any, half: torch.dtype | None) -> float:
    """Bytes of a copy whose linear layers and convolutions are in half precision."""
    size = SINGLE * sum(p.numel() for p in network.parameters())
    if half is not None:
        for layer in network.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                size -= HALF * sum(p.numel() for p in layer.parameters())
    return float(size)


def update_bytes(shapes: list[torch.Size], optimizer: str, on_cuda: bool) -> float:
    """Bytes that an optimiser makes in a step beside its state, for weights of these shapes.

    On a GPU torch's AdamW updates all weights at once, and makes a square root of each. All others
    go from weight to weight.
    """
    sizes = [shape.numel() for shape in shapes]
    if optimizer == "adamw" and on_cuda:
        return float(SINGLE * sum(sizes))
    return float(2 * SINGLE * max(sizes))


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
