"""The pipelines of a run: one to encode with, one to train in, one to sample from; each loads what it needs and no more."""

from __future__ import annotations

from typing import Any

import torch

from deradiff.data.encoders import described_encoders, encoders_key, source_key
from deradiff.files import locate
from deradiff.models.base_model import BaseModel
from train.config import TrainConfig

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def precision(config: TrainConfig) -> torch.dtype:
    """Of networks that are not trained. A pipeline that will be saved is float32 throughout."""
    return torch.float32 if config.objective == "pretrain" else DTYPES[config.precision]


def encoders_of(config: TrainConfig) -> str:
    """What the encodings depend on besides the data, known before a weight is loaded."""
    model = config.model
    if model.base is None:
        told = f"{source_key(str(model.clip))} {source_key(str(model.vae))}"
    else:
        told = encoders_key(model.base, model.revision, model.vae)
    return f"{told} {precision(config)}"


def encoding_pipeline(config: TrainConfig, device: torch.device) -> Any:
    """What encodes pictures and captions, on the device, without the denoiser."""
    if config.model.base is None:
        return _new_pipeline(config).to(device)
    denoiser = BaseModel(config.model.base, config.model.revision).family.denoiser
    return frozen_pipeline(config, **{denoiser: None}).to(device)


def base_pipeline(config: TrainConfig, encoders: bool = True) -> Any:
    """What is trained in: the base model, or a new one around the trained parts that the config names. encoders: with what encodes.

    Frozen networks are in the run's precision; a network that is trained as a whole is read in float32, so that what it learns is
    a difference from the very weights that sampling mixes it with. A pipeline that will be saved is whole.
    """
    import diffusers

    model, dtype = config.model, precision(config)
    if model.base is None:
        return _new_pipeline(config)
    base, parts = locate(model.base), {}
    if not encoders and config.objective != "pretrain":
        parts = described_encoders(model.base, model.revision, model.vae, dtype)
    if config.finetune.method == "full" and dtype != torch.float32:
        family = BaseModel(base, model.revision).family
        kind = getattr(diffusers, family.denoiser_class)
        exact = kind.from_pretrained(
            base, subfolder=family.denoiser, revision=model.revision, dtype=torch.float32
        )
        parts = {**parts, family.denoiser: exact}
    return frozen_pipeline(config, **parts)


def frozen_pipeline(config: TrainConfig, **parts: Any) -> Any:
    """The base model as it samples: in the run's precision, with the autoencoder that the config names. parts: in place of its own."""
    from diffusers import AutoencoderKL

    model, dtype = config.model, precision(config)
    if model.vae and "vae" not in parts:
        parts["vae"] = AutoencoderKL.from_pretrained(locate(model.vae), dtype=dtype)
    return BaseModel(str(model.base), model.revision).load_pipeline(dtype, parts)


def _new_pipeline(config: TrainConfig) -> Any:
    from diffusers import AutoencoderKL

    from deradiff.worlds import networks

    model = config.model
    clip, tokenizer, _ = networks.load_clip(locate(str(model.clip)))
    vae = AutoencoderKL.from_pretrained(locate(str(model.vae)))
    return networks.make_pipeline(
        networks.text_tower(clip), tokenizer, vae, model.resolution, tuple(model.channels)
    )
