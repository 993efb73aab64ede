"""What a run needs of one device and of the disk, phase by phase, before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from deradiff.data.cache import examples_at_once, images_at_once
from deradiff.models.autoencoders import encoding_precision
from deradiff.models.family import Family
from deradiff.models.flops import denoiser_inputs, meta_denoiser
from deradiff.models.peak_memory import (
    decoding_bytes,
    encoding_bytes,
    forward_bytes,
    weight_bytes,
)
from deradiff.models.requirements import CUDA_OVERHEAD, Requirements, dpo_requirements
from train.build import DTYPES, frozen_dtype, lora_config
from train.config import TrainConfig


class Base(Protocol):
    """What an estimate asks of a base model."""

    @property
    def family(self) -> Family:
        """Its family."""

    @property
    def denoiser_config(self) -> Mapping[str, Any]:
        """The config of its denoiser."""

    @property
    def vae_config(self) -> Mapping[str, Any]:
        """The config of the autoencoder that is used with it."""

    def describe_vae(self, dtype: torch.dtype) -> Any:
        """That autoencoder without weights."""

    def describe_text_encoders(self, dtype: torch.dtype) -> list[Any]:
        """Its text encoders without weights."""


@dataclass(frozen=True)
class Estimate:
    """Memory of one device in bytes, by phase, and disk.

    Attributes:
        steps: what optimiser steps need.
        loop_encoders: of the encoders and their work, where each step encodes its own examples.
        caching: while the cache is built; 0: there is none.
        panel: while a panel is drawn; 0: there are none.
        overhead: of the device beside tensors; it is in all phases.
        checkpoints: bytes of the disk, with the one that is being written.
    """

    steps: Requirements
    loop_encoders: float
    caching: float
    panel: float
    overhead: float
    checkpoints: float

    @property
    def training(self) -> float:
        """Memory of optimiser steps."""
        return self.steps.memory + self.loop_encoders + self.overhead

    @property
    def memory(self) -> float:
        """Memory at the peak of the run."""
        return max(self.training, self.caching, self.panel)


def latent_side(config: TrainConfig, base: Base) -> int:
    """Rows, and columns, of the latents."""
    return config.model.resolution // base.family.pixels_per_latent(base.vae_config)


def estimate(config: TrainConfig, base: Base, rows: int) -> Estimate:
    """Count what a run of Diffusion-DPO needs. It takes seconds.

    Args:
        config: of the run.
        base: its base model.
        rows: of the data.
    """
    needs = step_requirements(config, base)
    overhead = device_overhead(config)
    kept = config.keep_last + config.keep_best
    encoding = encoding_memory(config, base, rows)
    has_panels = config.panel.every > 0
    return Estimate(
        steps=needs,
        loop_encoders=0.0 if config.data.cache else encoding,
        caching=encoding + overhead if config.data.cache else 0.0,
        panel=panel_memory(config, base, needs) + overhead if has_panels else 0.0,
        overhead=overhead,
        checkpoints=(kept + 1) * needs.checkpoint,
    )


def device_overhead(config: TrainConfig) -> float:
    """Bytes of the device beside tensors."""
    return 0.0 if config.cpu else CUDA_OVERHEAD


def step_requirements(config: TrainConfig, base: Base) -> Requirements:
    """What the optimiser steps need."""
    optim = config.optim
    side = latent_side(config, base)
    half = DTYPES[config.precision]
    is_lora = config.finetune.method == "lora"
    return dpo_requirements(
        base.denoiser_config,
        side,
        side,
        config.steps,
        optim.pairs_per_step,
        method=config.finetune.method,
        optimizer="adamw8bit" if optim.name.startswith("adamw8bit") else optim.name,
        checkpointing=config.model.gradient_checkpointing,
        batch=optim.batch_size,
        tokens=base.family.prompt_tokens,
        lora=lora_config(config, base.family) if is_lora else None,
        average=optim.ema > 0,
        half=half if half != torch.float32 else None,
        on_cuda=not config.cpu,
    )


def encoding_memory(config: TrainConfig, base: Base, rows: int) -> float:
    """Bytes while images are encoded: the encoders' weights, and what the autoencoder makes."""
    # In a cache so many as fit at once, in a step those of the batch.
    resolution = config.model.resolution
    dtype = frozen_dtype(config)
    vae = base.describe_vae(dtype)
    per_example = 2 if config.spec.needs_pairs else 1
    with encoding_precision(vae):
        examples = config.optim.batch_size
        if config.data.cache:
            examples = min(rows, examples_at_once(resolution, vae.dtype, per_example))
        images = min(per_example * examples, images_at_once(resolution, vae.dtype))
        own = weight_bytes(vae) + encoding_bytes(base.family, vae, resolution, images)
    return own + _text_encoder_bytes(base, dtype)


def panel_memory(config: TrainConfig, base: Base, needs: Requirements) -> float:
    """Bytes while a panel is drawn: what the run holds, and a pipeline with the anchor at work."""
    # The encoders of the prompts, which are gone when the images are sampled.
    dtype = frozen_dtype(config)
    vae = base.describe_vae(dtype)
    weights = weight_bytes(vae)
    encoders = weights + _text_encoder_bytes(base, dtype)

    # The anchor: a LoRA in the network that is trained, or a network beside the reference's.
    network = nn.Module.to(meta_denoiser(base.denoiser_config), dtype).eval()
    is_lora = config.finetune.method == "lora"
    networks = dtype.itemsize * needs.trained if is_lora else 2 * weight_bytes(network)

    # A guided evaluation, and then the image's decoding.
    side = latent_side(config, base)
    rows = 1 if base.family.guidance_distilled else 2
    tokens = base.family.prompt_tokens
    inputs = denoiser_inputs(network.config, side, side, tokens, images=rows)
    with encoding_precision(vae):
        decoding = decoding_bytes(base.family, vae, config.model.resolution)
        decoding += weight_bytes(vae) - weights
    work = max(forward_bytes(network, inputs), decoding)
    return needs.held + max(encoders, networks + weights + work)


def _text_encoder_bytes(base: Base, dtype: torch.dtype) -> float:
    return sum(weight_bytes(encoder) for encoder in base.describe_text_encoders(dtype))
