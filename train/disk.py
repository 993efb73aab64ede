"""The disk that a run's caches take, known from configs and counts before a weight is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from deradiff.data.pairs import CaptionedImages, Pairs
from deradiff.files import locate
from deradiff.models.base_model import BaseModel
from deradiff.models.family import Family
from train.config import TrainConfig


def in_units(count: float) -> str:
    """A number of bytes as people read it, in powers of ten."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def is_cached(config: TrainConfig) -> bool:
    return (
        config.data.cache
        and config.objective in ("dpo", "pretrain")
        and config.model.base is not None
    )


def described(config: TrainConfig) -> tuple[Family, dict[str, Any], int]:
    """The base model's family, its denoiser's config, and the side of its latents."""
    import diffusers

    base, revision = locate(str(config.model.base)), config.model.revision
    family = BaseModel(str(config.model.base), revision).family
    denoiser = dict(
        getattr(diffusers, family.denoiser_class).load_config(
            base, subfolder=family.denoiser, revision=revision
        )
    )
    vae = (
        diffusers.AutoencoderKL.load_config(locate(config.model.vae))
        if config.model.vae
        else diffusers.AutoencoderKL.load_config(base, subfolder="vae", revision=revision)
    )
    return family, denoiser, config.model.resolution // 2 ** (len(vae["block_out_channels"]) - 1)


def cache_need(config: TrainConfig, rows: CaptionedImages) -> tuple[float, float]:
    """Bytes of the latents and text embeddings, and of the reference errors, that the run's caches hold when they are complete."""
    from deradiff.data.reference_errors import RECORD
    from deradiff.models.requirements import cache_bytes

    family, denoiser, side = described(config)
    pictures = len(rows) * (2 if isinstance(rows, Pairs) else 1) * (2 if config.data.flip else 1)
    half = cache_bytes(
        denoiser, side, side, pictures, len({*rows.captions, ""}), family.prompt_tokens
    )
    encodings = half * (2 if config.precision == "no" or config.objective == "pretrain" else 1)
    pairs = config.steps * config.optim.batch_size * config.optim.accumulation  # of one rank
    return (
        encodings,
        pairs * RECORD.itemsize
        if config.objective == "dpo" and config.dpo.reference_errors
        else 0.0,
    )


def check_disk(config: TrainConfig, rows: CaptionedImages) -> None:
    """Raises ValueError where what is free, and what is cached already, is less than the caches need."""
    if not is_cached(config):
        return
    folder = Path(config.runs) / "cache"
    there = sum(f.stat().st_size for f in folder.rglob("*.safetensors")) if folder.is_dir() else 0
    free = shutil.disk_usage(
        next(p for p in (folder, *folder.absolute().parents) if p.exists())
    ).free
    need = sum(cache_need(config, rows))
    if need > free + there:
        raise ValueError(
            f"the cache of {len(rows)} rows needs {in_units(need)} and {folder} has {in_units(free + there)}: "
            "give runs=<a folder on a larger disk>, data.limit=<fewer rows>, or data.cache=false"
        )
