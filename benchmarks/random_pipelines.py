"""What the benchmarks measure on: pipelines of random weights, and pairs of noise.

Only the sizes of networks matter to them: those of the published configs, or a share of these.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from deradiff.models.published import AUTOENCODER, DENOISERS
from deradiff.models.unet import SIZE_NUMBERS
from deradiff.worlds.networks import make_tokenizer

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The noise schedule of Stable Diffusion."""

TOKENS = 77
"""Tokens of a prompt."""

PIXELS_PER_LATENT = 8
"""Of the published autoencoders."""

WIDTH = 320
"""Channels of the first block of both published denoisers."""

ENCODER_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
"""Of the first and the second text encoder, in transformers."""


@dataclass(frozen=True)
class TextEncoderSize:
    """The size of a text encoder.

    Attributes:
        width: of its embeddings.
        layers: how many it has.
    """

    width: int
    layers: int


@dataclass(frozen=True)
class PipelineSize:
    """How large the networks of a pipeline are.

    Attributes:
        network: `sd15` or `sdxl`: what they are called.
        text_encoders: of each text encoder, one for `sd15` and two for `sdxl`.
        width: channels of the denoiser's first block.
        autoencoder: channels of the autoencoder's levels.
        shallow: one layer a block of the denoiser, where the published ones have up to ten.
    """

    network: str
    text_encoders: tuple[TextEncoderSize, ...]
    width: int = WIDTH
    autoencoder: tuple[int, ...] = tuple(AUTOENCODER["block_out_channels"])
    shallow: bool = False

    def denoiser_config(self, latent_side: int) -> dict[str, Any]:
        """The denoiser's config.

        Args:
            latent_side: side of the latents.
        """
        # The published one, with as many channels and heads less as it is narrower.
        config = scaled_denoiser_config(self.network, self.width, latent_side)
        if self.shallow:
            config |= {"layers_per_block": 1, "transformer_layers_per_block": 1}

        # What it reads of the texts.
        widths = [encoder.width for encoder in self.text_encoders]
        config["cross_attention_dim"] = sum(widths)
        if self.network == "sdxl":
            sizes = SIZE_NUMBERS * config["addition_time_embed_dim"]
            config["projection_class_embeddings_input_dim"] = sizes + widths[-1]
        return config


PUBLISHED = {
    "sd15": PipelineSize("sd15", (TextEncoderSize(768, 12),)),
    "sdxl": PipelineSize("sdxl", (TextEncoderSize(768, 12), TextEncoderSize(1280, 32))),
}
"""The pipelines as they are published."""


def scaled_denoiser_config(network: str, width: int, latent_side: int) -> dict[str, Any]:
    """The config of a published denoiser, at another width.

    Args:
        network: `sd15` or `sdxl`.
        width: channels of its first block.
        latent_side: side of its latents.
    """
    config = dict(DENOISERS[network])
    published = config.get("block_out_channels", (WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH))
    config["block_out_channels"] = [channels * width // WIDTH for channels in published]
    config["sample_size"] = latent_side

    # SD1.5 has as many heads at every width; SDXL's heads are as wide at every number of channels.
    heads = config["attention_head_dim"]
    if isinstance(heads, list):
        config["attention_head_dim"] = [max(1, count * width // WIDTH) for count in heads]
    return config


@contextmanager
def made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Within the block new networks are made on a device and in a precision, without a detour.

    Args:
        device: such as `cuda`.
        dtype: their precision.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def random_pipeline(
    size: PipelineSize,
    captions: Sequence[str],
    resolution: int,
    device: str,
    dtype: torch.dtype,
    denoiser: bool = True,
    encoders: bool = True,
) -> Any:
    """A pipeline of random weights, the same ones each time.

    Args:
        size: of its networks.
        captions: whose words its tokenizer knows.
        resolution: pixels of an image's side.
        device: where its weights are made.
        dtype: their precision.
        denoiser: whether it has a denoiser.
        encoders: whether it has text encoders, and an autoencoder with weights. Without, the
            autoencoder is on the meta device, because it says the shape of latents.
    """
    torch.manual_seed(0)
    tokenizer = make_tokenizer(list(captions), length=TOKENS)
    text_encoders: list[Any] = [None] * len(size.text_encoders)
    unet = None
    with made_on(device, dtype):
        if denoiser:
            config = size.denoiser_config(resolution // PIXELS_PER_LATENT)
            unet = UNet2DConditionModel.from_config(config)
        if encoders:
            text_encoders = make_text_encoders(size.text_encoders, tokenizer)
    with made_on(device if encoders else "meta", dtype):
        channels = list(size.autoencoder)
        vae = AutoencoderKL.from_config(AUTOENCODER | {"block_out_channels": channels})
    return pipeline_of(unet, vae, tokenizer, text_encoders)


def pipeline_of(unet: Any, vae: Any, tokenizer: Any, text_encoders: Sequence[Any]) -> Any:
    """The pipeline around given networks, each of which may be None.

    Args:
        unet: its denoiser.
        vae: its autoencoder.
        tokenizer: of all text encoders.
        text_encoders: one for Stable Diffusion's kind, two for SDXL's.
    """
    parts = {
        "vae": vae,
        "unet": unet,
        "text_encoder": text_encoders[0],
        "tokenizer": tokenizer,
        "scheduler": DDPMScheduler(**SCHEDULE, steps_offset=1, clip_sample=False),
    }
    if len(text_encoders) == 1:
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return StableDiffusionXLPipeline(
        **parts, text_encoder_2=text_encoders[1], tokenizer_2=tokenizer, add_watermarker=False
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


def make_text_encoders(sizes: Sequence[TextEncoderSize], tokenizer: Any) -> list[Any]:
    """Random text encoders, the first and maybe the second one.

    Args:
        sizes: of each.
        tokenizer: whose words they know.
    """
    encoders = []
    for name, size in zip(ENCODER_CLASSES, sizes):
        config = transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.width,
            intermediate_size=4 * size.width,
            num_hidden_layers=size.layers,
            projection_dim=size.width,
            num_attention_heads=size.width // 64,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        encoders.append(getattr(transformers, name)(config).eval())
    return encoders


def _noise_jpg(seed: int, side: int) -> bytes:
    """Smooth noise as a JPEG: images of pure noise would be larger than photographs are."""
    shape = (side // 16, side // 16, 3)
    coarse = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()
