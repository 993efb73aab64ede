"""What is published of the recipes that deradiff follows, as numbers to count with: denoisers, pairs, data sets, GPUs, the paper's row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# config.json of the published UNets, as far as it differs from UNet2DConditionModel's defaults
DENOISERS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
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
AUTOENCODER: dict[str, Any] = {  # of both
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class Recipe:
    """A launcher of SalesforceAIResearch/DiffusionDPO. pairs: of one optimiser step."""

    steps: int
    pairs: int
    optimizer: str
    checkpointing: bool


RECIPES = {
    "sd15": Recipe(2000, 2048, "adamw", False),
    "sdxl": Recipe(2000, 2048, "adafactor", True),
}


@dataclass(frozen=True)
class GPU:
    """tflops: 10^12 FLOP/s of dense 16-bit matrix products accumulated in fp32, of the maker's data sheet. memory: bytes."""

    tflops: float
    memory: float


GPUS = {
    "A100-80GB": GPU(312.0, 80e9),
    "H100-SXM": GPU(989.4, 80e9),
    "H200": GPU(989.4, 141e9),
    "L40S": GPU(362.0, 48e9),
    "RTX-4090": GPU(165.2, 24e9),
}


@dataclass(frozen=True)
class DataSet:
    """rows of the training split, ties and unlabelled ones too; captions: distinct ones, where known; bytes of the download."""

    rows: int
    captions: int | None
    bytes: float


DATA_SETS = {
    "pickapic_v1": DataSet(583_747, None, 204e9),
    "pickapic_v2": DataSet(959_040, 59_000, 335e9),
}

# DeRaDiff's row: one SDXL anchor aligned from scratch
PAPER_GPU_HOURS, PAPER_EFLOPS, PAPER_GPU, PAPER_UTILISATION = 336.0, 188.7, "A100-80GB", 0.5
