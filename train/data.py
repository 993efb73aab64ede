"""From a config to the run's data."""

from __future__ import annotations

from accelerate import Accelerator

from deradiff.data.pairs import CaptionedImages, Pairs
from train.config import OBJECTIVES, TrainConfig
from train.data_config import DataConfig
from train.disk import check_disk
from train.made import made


def make_data(config: TrainConfig, accelerator: Accelerator) -> CaptionedImages:
    """The run's data, counted. Raises ValueError for what cannot be read, and where the cache of it would not fit on the disk."""
    data = config.data
    reader = Pairs if OBJECTIVES[config.objective] else CaptionedImages
    if data.source == "table":
        with accelerator.main_process_first():  # it downloads, and the others read what it did
            rows = reader(
                str(data.path),
                data.split,
                data.revision,
                data.limit,
                streaming=data.streaming,
                max_broken=data.max_broken,
            )
    else:
        path = str(made(config, accelerator))
        with accelerator.main_process_first():
            rows = reader(
                path, limit=data.limit, streaming=data.streaming, max_broken=data.max_broken
            )
    accelerator.print(f"train: {counted(rows)}")
    check_disk(config, rows)
    return rows


def counted(rows: CaptionedImages) -> str:
    """How many rows there are, and how many were dropped for what."""
    dropped = f"{rows.uncaptioned} rows without a caption dropped"
    if isinstance(rows, Pairs):
        return f"{len(rows)} pairs with a winner; {rows.ties} ties, {rows.unlabelled} unlabelled rows and {dropped}"
    return f"{len(rows)} captioned images; {dropped}"


def told(data: DataConfig) -> str:
    """The data, as an anchor's card names it."""
    if data.source.startswith("shapes"):
        return f"{data.source}, {data.count}, {data.scorer}"
    if data.source == "sampled_pairs":
        return f"{data.count} pairs sampled by {data.pipeline or 'the base model'} for {data.prompts}, labelled by {data.scorer}"
    labels = f", pairs labelled by {data.scorer}" if data.source == "scored_pairs" else ""
    return f"{data.path}@{data.revision or 'main'}, {data.split}{labels}"
