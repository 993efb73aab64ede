"""Data that has to be drawn, sampled or labelled before training: written once below runs/data, named by what it depends on."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from deradiff.data import synthetic_pairs
from deradiff.data.pairs import CaptionedImages
from deradiff.files import slug
from deradiff.scorers import load_scorer
from deradiff.worlds import shapes
from train.config import TrainConfig


def made(config: TrainConfig, accelerator: Accelerator) -> Path:
    """The parquet file or folder of the rows that `data.source` stands for; written if it is not there, by all ranks together."""
    folder = Path(config.runs) / "data"
    if config.data.source.startswith("shapes"):
        with accelerator.main_process_first():
            return _drawn(config, folder)
    images = (
        _sampled(config, folder, accelerator) if config.data.source == "sampled_pairs" else None
    )
    path = _labelled(config, folder, images, accelerator)
    accelerator.wait_for_everyone()
    return path


def _drawn(config: TrainConfig, folder: Path) -> Path:
    data = config.data
    kind = "images" if data.source == "shapes_images" else f"pairs-{data.scorer}"
    path = (
        folder / f"shapes-{kind}-{data.count}-{_digest(Path(shapes.__file__).read_text())}.parquet"
    )
    if not path.is_file() and data.source == "shapes_images":
        shapes.write_images(path, data.count, seed=0)
    elif not path.is_file():
        shapes.write_pairs(path, data.count, seed=1, reward=data.scorer)
    return path


def _sampled(config: TrainConfig, folder: Path, accelerator: Accelerator) -> CaptionedImages:
    """Two pictures for each of data.count pairs. They do not depend on the scorer: another one, or temperature, labels them again."""
    from deradiff.data.prompts import load_prompts

    data, model = config.data, config.model
    prompts = [p.text for p in load_prompts(str(data.prompts))]
    source, revision = (data.pipeline, None) if data.pipeline else (str(model.base), model.revision)
    vae = None if data.pipeline else model.vae
    key = f"{prompts}/{source}/{revision}/{vae}/{config.precision}/{model.resolution}/{data.steps}/{data.guidance_scale}/{data.count}"
    path = folder / f"sampled-{slug(Path(source).name, 40)}-{data.count}-{_digest(key)}"
    synthetic_pairs.write_sampled_images(
        path,
        partial(_pipeline, config, source, revision, vae, accelerator),
        prompts,
        data.count,
        batch_size=data.batch_size,
        num_inference_steps=data.steps,
        guidance_scale=data.guidance_scale,
        height=model.resolution,
        width=model.resolution,
    )
    accelerator.wait_for_everyone()
    return CaptionedImages(str(path), streaming=True)


def _pipeline(
    config: TrainConfig,
    source: str,
    revision: str | None,
    vae: str | None,
    accelerator: Accelerator,
) -> Any:
    from diffusers import AutoencoderKL

    from deradiff.files import locate
    from deradiff.models.base_model import BaseModel
    from train.pipelines import DTYPES

    pipe = BaseModel(source, revision).load_pipeline(DTYPES[config.precision])
    if vae:
        pipe.vae = AutoencoderKL.from_pretrained(locate(vae), dtype=DTYPES[config.precision])
    return pipe.to(accelerator.device)


def _labelled(
    config: TrainConfig, folder: Path, sampled: CaptionedImages | None, accelerator: Accelerator
) -> Path:
    data = config.data
    images = (
        sampled
        if sampled is not None
        else CaptionedImages(str(data.path), split=data.split, revision=data.revision)
    )
    pairs = (
        synthetic_pairs.drawn_pairs(images, data.count)
        if sampled is None
        else synthetic_pairs.consecutive_pairs(images)
    )
    load = partial(load_scorer, data.scorer, data.scorer_checkpoint, device=str(accelerator.device))
    key = f"{images.fingerprint}/{load().version}/{data.temperature}/{synthetic_pairs.PART}"
    name = slug(Path(images.source).stem, 60)
    path = folder / f"{name}-pairs-{data.scorer}-{len(pairs)}-{_digest(key)}"
    synthetic_pairs.write_scored_pairs(path, images, pairs, load, data.temperature)
    return path


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
