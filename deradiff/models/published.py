"""What is published of the recipes that deradiff follows, as numbers to count with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from deradiff.models.families import FAMILIES
from deradiff.models.family import Family
from deradiff.models.flops import denoiser_flops, dpo_step_flops, encoder_flops
from deradiff.models.gpus import GPUS

DENOISERS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""`config.json` of the published UNets, where it differs from the defaults of their class."""

AUTOENCODER: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""The autoencoder's config of both."""

CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
"""The text encoders' configs, where they differ from the defaults of their class."""

PUBLISHED_MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}
"""The families of the repositories whose configs stand here."""


@dataclass(frozen=True)
class PublishedModel:
    """A published base model, described as `BaseModel` does it, without a file.

    Attributes:
        name: of the family.
    """

    name: str

    @property
    def family(self) -> Family:
        """Its family."""
        return FAMILIES[self.name]

    @property
    def denoiser_config(self) -> dict[str, Any]:
        """The config of its denoiser."""
        return DENOISERS[self.name]

    @property
    def vae_config(self) -> dict[str, Any]:
        """The config of its autoencoder."""
        return AUTOENCODER

    def describe_vae(self, dtype: torch.dtype) -> Any:
        """Its autoencoder without weights (meta device)."""
        with torch.device("meta"):
            return AutoencoderKL.from_config(AUTOENCODER).type(dtype)

    def describe_text_encoders(self, dtype: torch.dtype) -> list[Any]:
        """Its text encoders without weights (meta device)."""
        with torch.device("meta"):
            encoders: list[Any] = [CLIPTextModel(CLIPTextConfig(**CLIP_L))]
            if self.name == "sdxl":
                encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIG_G)))
        return [encoder.to(dtype) for encoder in encoders]


@dataclass(frozen=True)
class PublishedRun:
    """A launcher of SalesforceAIResearch/DiffusionDPO.

    Attributes:
        steps: optimiser steps.
        pairs: of one optimiser step.
        optimizer: its name.
        checkpointing: whether it uses gradient checkpointing.
    """

    steps: int
    pairs: int
    optimizer: str
    checkpointing: bool


PUBLISHED_RUNS = {
    "sd15": PublishedRun(steps=2000, pairs=2048, optimizer="adamw", checkpointing=False),
    "sdxl": PublishedRun(steps=2000, pairs=2048, optimizer="adafactor", checkpointing=True),
}


@dataclass(frozen=True)
class DataSet:
    """A published set of preference pairs.

    Attributes:
        rows: of the training split, with ties and unlabelled rows.
        captions: distinct ones; None where that is not published.
        bytes: of the download.
    """

    rows: int
    captions: int | None
    bytes: float


DATA_SETS = {
    "pickapic_v1": DataSet(rows=583_747, captions=None, bytes=204e9),
    "pickapic_v2": DataSet(rows=959_040, captions=59_000, bytes=335e9),
}

# DeRaDiff's row: one SDXL anchor aligned from scratch.
PAPER_FAMILY = "sdxl"
PAPER_GPU_HOURS = 336.0
PAPER_EFLOPS = 188.7
PAPER_GPU = "A100-80GB"
PAPER_UTILISATION = 0.5


@dataclass(frozen=True)
class PublishedCost:
    """The paper's row beside a count of the same recipe.

    Attributes:
        gpu_hours: as stated.
        published_flops: as stated.
        flops: counted, of the denoiser alone.
        ratio: counted over stated.
        with_everything: counted of what the published launcher executes: gradient checkpointing and
            the autoencoder, too.
        why: why they differ, in words.
    """

    gpu_hours: float
    published_flops: float
    flops: float
    ratio: float
    with_everything: float
    why: str


def published_dpo(family: str = PAPER_FAMILY) -> PublishedCost:
    """The paper's cost of one SDXL anchor (336 GPU-hours, 188.7 EFLOP), derived from the recipe.

    Raises:
        ValueError: for another family, of which the paper states no cost.
    """
    if family != PAPER_FAMILY:
        raise ValueError(
            f"the paper states the cost of an anchor for {PAPER_FAMILY} alone, not for {family}"
        )
    run = PUBLISHED_RUNS[family]
    side = DENOISERS[family]["sample_size"]
    peak = GPUS[PAPER_GPU].tflops * 1e12

    # What one image costs
    forward = denoiser_flops(DENOISERS[family], side, side)
    encoder = encoder_flops(AUTOENCODER, 8 * side, 8 * side)

    # What the run costs: as the paper counts, and with everything that the launcher executes
    flops = run.steps * dpo_step_flops(forward, run.pairs, "full")
    executed = run.steps * dpo_step_flops(
        forward, run.pairs, "full", run.checkpointing, encoder=encoder
    )
    stated = PAPER_EFLOPS * 1e18
    available = PAPER_GPU_HOURS * 3600 * peak
    why = (
        f"{PAPER_EFLOPS:g} EFLOP is no count: it is {PAPER_GPU_HOURS:g} h at "
        f"{PAPER_UTILISATION:.0%} of an A100's {peak / 1e12:g} TFLOP/s. "
        f"The recipe is {run.steps} steps of {run.pairs} pairs, and an image costs four forwards "
        f"of {forward / 1e12:.2f} TFLOP (the reference's 1, ours 1, backward 2): "
        f"{flops / 1e18:.1f} EFLOP, {flops / stated - 1:+.0%}, which in {PAPER_GPU_HOURS:g} h is "
        f"{flops / available:.0%} of the peak. With the launcher's gradient checkpointing (one "
        f"forward more) and its autoencoder in the loop ({encoder / 1e12:.2f} TFLOP an image) it "
        f"executes {executed / 1e18:.1f} EFLOP, {executed / available:.0%} of the peak, "
        "which such training hardly reaches: the hours and the recipe are unlikely to be both as "
        "stated."
    )
    return PublishedCost(PAPER_GPU_HOURS, stated, flops, flops / stated, executed, why)
