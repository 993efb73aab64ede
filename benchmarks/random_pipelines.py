"""What a benchmark of training needs: pipelines around given networks, and pairs of noise.

The text encoders have random weights.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import transformers
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from deradiff.worlds.networks import make_tokenizer

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The noise schedule of Stable Diffusion."""

TOKENS = 77
"""Tokens of a prompt."""


def sd_pipeline(unet: Any, vae: Any, captions: Sequence[str]) -> Any:
    """A Stable Diffusion pipeline.

    Args:
        unet: its denoiser.
        vae: its autoencoder.
        captions: whose words its tokenizer knows.
    """
    tokenizer = make_tokenizer(list(captions), length=TOKENS)
    width = unet.config.cross_attention_dim
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=_text_encoder("CLIPTextModel", tokenizer, width, layers=6),
        tokenizer=tokenizer,
        scheduler=DDPMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(unet: Any, vae: Any, captions: Sequence[str]) -> Any:
    """An SDXL pipeline, whose two text encoders have their published sizes.

    Args:
        unet: its denoiser.
        vae: its autoencoder.
        captions: whose words its tokenizer knows.
    """
    tokenizer = make_tokenizer(list(captions), length=TOKENS)
    first = _text_encoder("CLIPTextModel", tokenizer, 768, layers=12)
    second = _text_encoder("CLIPTextModelWithProjection", tokenizer, 1280, layers=32)
    return StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=first.to(unet.dtype),
        text_encoder_2=second.to(unet.dtype),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
    )


def write_noise_pairs(path: Path, count: int, side: int, captions: Sequence[str]) -> None:
    """Write pairs of noise with Pick-a-Pic's columns; jpg_0 is the winner.

    Args:
        path: the parquet file.
        count: of pairs.
        side: of an image, in pixels.
        captions: which the pairs take in turn.
    """
    columns = {
        "jpg_0": [_noise_jpg(2 * i, side) for i in range(count)],
        "jpg_1": [_noise_jpg(2 * i + 1, side) for i in range(count)],
        "label_0": [1.0] * count,
        "label_1": [0.0] * count,
        "caption": [captions[i % len(captions)] for i in range(count)],
    }
    pq.write_table(pa.table(columns), path)


def _text_encoder(kind: str, tokenizer: Any, width: int, layers: int) -> Any:
    """A random text encoder, of a class of transformers."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        projection_dim=width,
        num_attention_heads=width // 64,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return getattr(transformers, kind)(config).eval()


def _noise_jpg(seed: int, side: int) -> bytes:
    """Smooth noise as a JPEG: images of pure noise would be larger than photographs are."""
    shape = (side // 16, side // 16, 3)
    coarse = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()
