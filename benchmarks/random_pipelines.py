"""What a benchmark needs of a base model: pipelines of random weights, and pairs of noise.

The denoiser and the autoencoder are given; the text encoders are made.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from deradiff.worlds.networks import make_tokenizer

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LENGTH = 77  # tokens of a prompt
HEAD = 64  # width of an attention head
COARSE = 16  # pixels of a square of noise


def _text_config(tokenizer: Any, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        projection_dim=width,
        num_attention_heads=width // HEAD,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def sd_pipeline(unet: Any, vae: Any, captions: Sequence[str]) -> StableDiffusionPipeline:
    """A pipeline of SD1.5's kind, with a text encoder of six layers.

    Args:
        unet: the denoiser.
        vae: the autoencoder.
        captions: what the tokenizer is made for.
    """
    tokenizer = make_tokenizer(list(captions), length=LENGTH)
    config = _text_config(tokenizer, unet.config.cross_attention_dim, 6)
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=tokenizer,
        scheduler=DDPMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(unet: Any, vae: Any, captions: Sequence[str]) -> StableDiffusionXLPipeline:
    """A pipeline of SDXL's kind, with its two text encoders at their published sizes.

    Args:
        unet: the denoiser.
        vae: the autoencoder.
        captions: what the tokenizer is made for.
    """
    tokenizer = make_tokenizer(list(captions), length=LENGTH)
    first = CLIPTextModel(_text_config(tokenizer, 768, 12)).eval()
    second = CLIPTextModelWithProjection(_text_config(tokenizer, 1280, 32)).eval()
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
    """Write pairs of noise images in Pick-a-Pic's columns; `jpg_0` is the winner.

    Args:
        path: of the parquet file.
        count: pairs.
        side: of an image, in pixels.
        captions: used in turn.
    """
    columns = {
        "jpg_0": [_noise_jpg(2 * i, side) for i in range(count)],
        "jpg_1": [_noise_jpg(2 * i + 1, side) for i in range(count)],
        "label_0": [1.0] * count,
        "label_1": [0.0] * count,
        "caption": [captions[i % len(captions)] for i in range(count)],
    }
    pq.write_table(pa.table(columns), path)


def _noise_jpg(seed: int, side: int) -> bytes:
    """Coarse noise, which compresses about as well as a photograph."""
    shape = (side // COARSE, side // COARSE, 3)
    coarse = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()
