"""The run's data: read, or first drawn, sampled or labelled; and the disk that its cache takes.

Generated data is written once below runs/data, in a file or folder named by what it depends on.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from configs.checks import section
from deradiff.data import synthetic_pairs
from deradiff.data.pairs import CaptionedImages, Pairs
from deradiff.data.part_files import Advance, PartFiles
from deradiff.data.prompts import load_prompts
from deradiff.data.reference_errors import RECORD
from deradiff.files import nearest_folder, slug
from deradiff.models.base_model import BaseModel
from deradiff.models.requirements import cache_bytes
from deradiff.scorers import ScorerSpec, check_prompts, load_scorer
from deradiff.scorers.weighted_sum import WeightedSum
from deradiff.terminal import say
from deradiff.worlds import shapes
from train.build import DTYPES, frozen_dtype
from train.config import SOURCES, DataConfig, TrainConfig
from train.estimate import Base, latent_side

IMAGES_SEED = 0  # of the shapes world's images, and of its pairs
PAIRS_SEED = 1


def make_data(
    config: TrainConfig, base: BaseModel | None, accelerator: Accelerator
) -> CaptionedImages:
    """The run's data; it is generated first, where the config says so. Collective.

    Raises:
        ValueError: where it cannot be read, and where its cache would not fit on the disk.
    """
    data = config.data
    if data.source == "table":
        say(
            f"train: reading the captions and labels of {data.path}",
            is_main=accelerator.is_main_process,
        )
        with accelerator.main_process_first():  # it downloads, and the others read the download
            rows = open_data(config, str(data.path), data.split, data.revision, data.streaming)
    else:
        path = generated_data(config, base, accelerator)
        with accelerator.main_process_first():
            rows = open_data(config, str(path), streaming=data.streaming)
    say(f"train: {row_counts(rows)}", is_main=accelerator.is_main_process)
    check_disk(config, base, rows)
    return rows


def open_data(
    config: TrainConfig,
    path: str,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    max_broken: float | None = None,
) -> CaptionedImages:
    """Open pairs or captioned images, whichever the objective needs.

    Args:
        config: of the run.
        path: a parquet file, a folder, or a data set of the hub.
        split: of a data set of the hub.
        revision: of a data set of the hub.
        streaming: read parquet where it lies.
        max_broken: None: that of the config.
    """
    reader = Pairs if config.spec.needs_pairs else CaptionedImages
    if max_broken is None:
        max_broken = config.data.max_broken
    limit = config.data.limit
    with section("data"):
        return reader(path, split, revision, limit, streaming=streaming, max_broken=max_broken)


def row_counts(rows: CaptionedImages) -> str:
    """How many rows there are, and how many were dropped for which reason."""
    dropped = f"{rows.missing_captions} rows without a caption dropped"
    if isinstance(rows, Pairs):
        return (
            f"{len(rows)} pairs with a winner; {rows.ties} ties, "
            f"{rows.missing_labels} unlabelled rows and {dropped}"
        )
    return f"{len(rows)} captioned images; {dropped}"


def describe_data(data: DataConfig) -> str:
    """The data, as an anchor's card names it."""
    scorer = data.scorer
    if isinstance(scorer, dict):
        scorer = " + ".join(f"{weight:g} {name}" for name, weight in data.scorer_weights.items())
    if data.source.startswith("shapes"):
        return f"{data.source}, {data.count}, {scorer}"
    if data.source == "sampled_pairs":
        sampled_by = data.pipeline or "the base model"
        return (
            f"{data.count} pairs sampled by {sampled_by} for {data.prompts}, labelled by {scorer}"
        )
    labels = f", pairs labelled by {scorer}" if data.source == "scored_pairs" else ""
    return f"{data.path}@{data.revision or 'main'}, {data.split}{labels}"


def reward_of(data: DataConfig) -> dict[str, float] | None:
    """The weights of the scorers that label the pairs; None: the pairs came with their labels.

    A label that is drawn at a temperature prefers by the scores over that temperature, and these
    are what DPO learns.
    """
    if not SOURCES[data.source]:
        return None
    temperature = data.temperature or 1.0
    return {name: weight / temperature for name, weight in data.scorer_weights.items()}


# Generated data


def generated_data(config: TrainConfig, base: BaseModel | None, accelerator: Accelerator) -> Path:
    """The parquet file or folder of the rows that `data.source` stands for.

    It is written where it is missing, by all ranks together. Collective.
    """
    # Rows of the shapes world, which one process draws.
    folder = Path(config.runs) / "data"
    if config.data.source.startswith("shapes"):
        with accelerator.main_process_first():
            return _draw_shapes(config.data, folder)

    # Images, sampled now or of a table, and which of them are paired.
    if config.data.source == "sampled_pairs":
        images = _sample_images(config, base, folder, accelerator)
        pairs = synthetic_pairs.consecutive_pairs(images)
    else:
        data = config.data
        with section("data"):
            images = CaptionedImages(str(data.path), split=data.split, revision=data.revision)
        pairs = synthetic_pairs.random_pairs(images, data.count)

    # The scorer labels the pairs.
    path = _label_pairs(config.data, folder, images, pairs, accelerator)
    accelerator.wait_for_everyone()
    return path


def _draw_shapes(data: DataConfig, folder: Path) -> Path:
    """Rows of the shapes world, named by the code that draws them too."""
    code = _digest(Path(shapes.__file__).read_text())
    kind = "images" if data.source == "shapes_images" else f"pairs-{data.scorer_name}"
    path = folder / f"shapes-{kind}-{data.count}-{code}.parquet"

    def write(rows: range, file: Path, advance: Advance) -> None:
        if data.source == "shapes_images":
            shapes.write_images(file, data.count, seed=IMAGES_SEED)
        else:
            shapes.write_pairs(file, data.count, seed=PAIRS_SEED, reward=data.scorer_weights)

    # One part: of several runs at once, one draws it.
    whole = PartFiles(folder / ".lock", lambda number: path, rows=1, size=1)
    whole.write_missing(write, "drawing", progress=False)
    return path


def _sample_images(
    config: TrainConfig, base: BaseModel | None, folder: Path, accelerator: Accelerator
) -> CaptionedImages:
    """Two images for each of `data.count` pairs.

    They do not depend on the scorer: another one, or another temperature, labels them again.
    """
    # What samples, and from which prompts.
    data = config.data
    resolution = config.model.resolution
    with section("data"):
        prompts = [prompt.text for prompt in load_prompts(str(data.prompts))]
    _check_captions(data, prompts)
    sampler = BaseModel(data.pipeline) if data.pipeline else base
    assert sampler is not None

    # The folder is named by all that the images depend on.
    key = (
        f"{prompts}/{sampler.source}/{sampler.revision}/{sampler.vae}/{config.precision}/"
        f"{resolution}/{data.steps}/{data.guidance_scale}/{data.count}"
    )
    name = slug(Path(sampler.source).name, 40)
    path = folder / f"sampled-{name}-{data.count}-{_digest(key)}"

    # The images; the family says how its pipelines are called.
    call: dict[str, Any] = {sampler.family.guidance_argument: data.guidance_scale}
    synthetic_pairs.write_sampled_images(
        path,
        partial(_sampling_pipeline, sampler, config, accelerator),
        prompts,
        data.count,
        batch_size=data.batch_size,
        negative_prompt=sampler.family.negative_prompt,
        num_inference_steps=data.steps,
        height=resolution,
        width=resolution,
        **call,
        **dict(sampler.family.call_options),
    )
    accelerator.wait_for_everyone()
    return CaptionedImages(str(path), streaming=True)


def _sampling_pipeline(sampler: BaseModel, config: TrainConfig, accelerator: Accelerator) -> Any:
    return sampler.load_pipeline(DTYPES[config.precision]).to(accelerator.device)


def _label_pairs(
    data: DataConfig,
    folder: Path,
    images: CaptionedImages,
    pairs: Any,
    accelerator: Accelerator,
) -> Path:
    """Pairs of images, the winner chosen by the scorer."""
    _check_captions(data, images.captions)

    # Other versions of a scorer score otherwise, so the version is a part of the folder's name.
    device = str(accelerator.device)
    if isinstance(data.scorer, dict):
        load: Any = partial(WeightedSum, data.scorer, device)
    else:
        load = partial(load_scorer, data.scorer, data.scorer_checkpoint, device=device)
    version = load().version
    key = f"{images.fingerprint}/{version}/{data.temperature}/{synthetic_pairs.PART}"
    name = slug(Path(images.path).stem, 60)
    path = folder / f"{name}-pairs-{data.scorer_name}-{len(pairs)}-{_digest(key)}"
    synthetic_pairs.write_scored_pairs(path, images, pairs, load, data.temperature)
    return path


def _check_captions(data: DataConfig, captions: Iterable[str]) -> None:
    """Raises ValueError where a scorer cannot judge by the captions, before there are images."""
    for name in data.scorer_weights:
        check_prompts(ScorerSpec(name, data.scorer_checkpoint), captions)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# The disk that the caches take.


def in_units(count: float) -> str:
    """A number of bytes as people read it, in powers of ten."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def is_cached(config: TrainConfig) -> bool:
    """Whether the size of the run's cache is known beforehand: it has one, and a base model."""
    return config.data.cache and config.spec.trains_denoiser and config.model.base is not None


def cache_need(config: TrainConfig, base: BaseModel, rows: CaptionedImages) -> tuple[float, float]:
    """The size of the run's caches when they are complete; no weight is read.

    Returns:
        Bytes of the latents and text embeddings, and bytes of the reference errors.
    """
    # Latents of every image, and the embeddings of every distinct caption.
    images = len(rows)
    if isinstance(rows, Pairs):
        images *= 2
    if config.data.flip:
        images *= 2
    captions = len({*rows.captions, ""})
    return encodings_need(config, base, images, captions), errors_need(config)


def encodings_need(config: TrainConfig, base: Base, images: int, captions: int) -> float:
    """Bytes of the latents and text embeddings in the cache."""
    side = latent_side(config, base)
    tokens = base.family.prompt_tokens
    half = cache_bytes(base.denoiser_config, side, side, images, captions, tokens)
    return half * frozen_dtype(config).itemsize / 2


def errors_need(config: TrainConfig) -> float:
    """Bytes of the reference's errors: a record for every pair that the run is trained on."""
    if not config.stores_reference_errors:
        return 0.0
    return float(config.steps * config.optim.pairs_per_step * RECORD.itemsize)


def check_disk(config: TrainConfig, base: BaseModel | None, rows: CaptionedImages) -> None:
    """Check that the run's caches fit on the disk; what is there already counts as free.

    Raises:
        ValueError: where they do not.
    """
    if base is None or not is_cached(config):
        return

    # What the caches may take: what is free, and what earlier parts of them have taken.
    folder = Path(config.runs) / "cache"
    present = 0
    if folder.is_dir():
        present = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    available = shutil.disk_usage(nearest_folder(folder)).free + present

    # What they will take.
    need = sum(cache_need(config, base, rows))
    if need > available:
        raise ValueError(
            f"the cache of {len(rows)} rows needs {in_units(need)} and {folder} has "
            f"{in_units(available)}: give runs=<a folder on a larger disk>, "
            "data.limit=<fewer rows>, or data.cache=false"
        )
