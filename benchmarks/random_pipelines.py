"""Pipelines around given networks, their text encoders with random weights, and pairs of noise: what a benchmark needs of a base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _text(kind: str, tokenizer: Any, width: int, layers: int, length: int) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        projection_dim=width,
        num_attention_heads=width // 64,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return getattr(transformers, kind)(config).eval()


def sd_pipeline(unet: Any, vae: Any, captions: Sequence[str]) -> Any:
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    from deradiff.worlds.networks import make_tokenizer

    tokenizer = make_tokenizer(list(captions), length=77)
    text = _text("CLIPTextModel", tokenizer, unet.config.cross_attention_dim, 6, 77)
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text,
        tokenizer=tokenizer,
        scheduler=DDPMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(unet: Any, vae: Any, captions: Sequence[str]) -> Any:
    """SDXL's two text encoders at their published sizes."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    from deradiff.worlds.networks import make_tokenizer

    tokenizer = make_tokenizer(list(captions), length=77)
    one, two = (
        _text("CLIPTextModel", tokenizer, 768, 12, 77),
        _text("CLIPTextModelWithProjection", tokenizer, 1280, 32, 77),
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=one.to(unet.dtype),
        text_encoder_2=two.to(unet.dtype),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
    )


def write_noise_pairs(path: Path, count: int, side: int, captions: Sequence[str]) -> None:
    """Pick-a-Pic's columns, jpg_0 the winner."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    def jpg(seed: int) -> bytes:
        coarse = np.random.default_rng(seed).integers(
            0, 256, (side // 16, side // 16, 3), dtype=np.uint8
        )
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(
            buffer, "JPEG", quality=92
        )
        return buffer.getvalue()

    pq.write_table(
        pa.table(
            {
                "jpg_0": [jpg(2 * i) for i in range(count)],
                "jpg_1": [jpg(2 * i + 1) for i in range(count)],
                "label_0": [1.0] * count,
                "label_1": [0.0] * count,
                "caption": [captions[i % len(captions)] for i in range(count)],
            }
        ),
        path,
    )
