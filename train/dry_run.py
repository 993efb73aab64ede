"""`data.dry_run=true`: what a run would read and need, without a download and without a weight."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps

from configs.checks import section
from deradiff.data.pairs import Examples, Item, Pairs
from deradiff.data.sources import parquet_files
from deradiff.data.stream import ParquetStream
from deradiff.files import slug, write_atomic
from deradiff.models.base_model import BaseModel
from deradiff.terminal import say
from train.batch_size import device_memory, sizes_that_may_fit, with_batch_size
from train.config import AUTO, TrainConfig
from train.data import (
    cache_need,
    check_disk,
    in_units,
    is_cached,
    open_data,
    row_counts,
)
from train.estimate import device_overhead, encoding_memory, estimate

EXAMPLES = 3  # in the sheet
SIDE = 256  # pixels of an image in the sheet
LINE = 20  # pixels of a line of text
LETTER = 6  # pixels of a letter, about


def dry_run(config: TrainConfig, base: BaseModel | None) -> Path:
    """Print the counts and the needs of a run, and write a sheet with three of its examples.

    Parquet is read where it lies: of a data set of the hub only the small columns, and the row
    groups of the examples in the sheet.

    Returns:
        The file of the sheet.

    Raises:
        ValueError: for data that would have to be generated first.
    """
    data = config.data
    if data.source != "table":
        raise ValueError(
            "data.dry_run=true shows rows that exist, and "
            f"data.source={data.source} makes them first: run it without"
        )

    # The rows; those with broken images are not counted out.
    say(f"train: reading the captions and labels of {data.path}")
    with section("data"):
        is_parquet = parquet_files(str(data.path), data.split, data.revision) is not None
    rows = open_data(config, str(data.path), data.split, data.revision, is_parquet, max_broken=1.0)
    captions = len(set(rows.captions))
    say(f"train: {data.path}, {data.split}: {row_counts(rows)}; {captions} distinct captions")

    # Three examples.
    name = slug(f"{data.path}-{data.split}")
    file = Path(config.runs) / "data" / f"{name}-dry-run.png"
    write_atomic(file, _example_sheet(Examples(rows, config.seed)))
    first = "winner" if isinstance(rows, Pairs) else "image"
    say(f"train: {EXAMPLES} of them, {first} first, are in {file}")

    # Disk and memory.
    if isinstance(rows.table, ParquetStream):
        say(f"train: {_data_need(config, rows.table)}")
    if base is not None and is_cached(config):
        encodings, errors = cache_need(config, base, rows)
        say(
            f"train: disk below {config.runs}/cache: {in_units(encodings)} of latents and text "
            f"embeddings, {in_units(errors)} of reference errors"
        )
        say(f"train: {_caching_need(config, base, len(rows))}")
    if base is not None and config.spec.has_reference:
        say("train: counting the memory of a step, which takes seconds")
        for line in _needs(config, base, len(rows)):
            say(f"train: {line}")
    check_disk(config, base, rows)
    return file


def _example_sheet(examples: Examples) -> bytes:
    """The first examples as a PNG: an example a row, its images side by side, its caption below."""
    # The images and the caption of each example.
    rows = []
    for epoch_index in examples.epoch_indices(0, min(EXAMPLES, len(examples.data))):
        rows.append(examples.batch(_images_and_caption, [epoch_index]))

    # A row for each: the images in squares, and a line of text.
    height = SIDE + LINE
    sheet = Image.new("RGB", (SIDE * len(rows[0][0]), height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (images, caption) in enumerate(rows):
        for column, image in enumerate(images):
            sheet.paste(ImageOps.contain(image, (SIDE, SIDE)), (column * SIDE, row * height))
        text = caption.encode("latin-1", "replace").decode("latin-1")  # PIL's font has no more
        text = text[: sheet.width // LETTER]
        draw.text((4, row * height + SIDE + 4), text, fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _images_and_caption(items: list[Item]) -> tuple[list[Image.Image], str]:
    """Of the one example of a batch."""
    return items[0].images, items[0].caption


def _data_need(config: TrainConfig, table: ParquetStream) -> str:
    """The disk that the data takes."""
    size = in_units(table.size)
    if config.data.streaming:
        return f"data: {size} of parquet, read where it lies"
    if table.shards[0].address.startswith("hf://"):
        copied = f"{in_units(2 * table.size)} of disk for its download and copy"
    else:
        copied = f"{size} of disk for its copy"
    return f"data: {size} of parquet, {copied}, or none with data.streaming=true"


def _caching_need(config: TrainConfig, base: BaseModel, rows: int) -> str:
    """The memory of one device while the cache is built."""
    size = in_units(encoding_memory(config, base, rows) + device_overhead(config))
    return f"memory of one device while the cache is built: {size}"


def _needs(config: TrainConfig, base: BaseModel, rows: int) -> list[str]:
    """The memory of one device in training, the disk of the checkpoints, and FLOPs."""
    if config.optim.batch_size == AUTO:
        # What a GPU would try first.
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        memory = device_memory(device)
        config = with_batch_size(config, sizes_that_may_fit(config, base, 1, memory)[0])
    found = estimate(config, base, rows)
    needs = found.steps
    parts = {
        "weights": needs.weights,
        "the reference": needs.reference,
        "gradients": needs.gradients,
        "optimiser": needs.optimizer,
        "moving average": needs.average,
        f"the work of {config.optim.batch_size} pairs": max(needs.activations, needs.update),
        "encoders": found.loop_encoders,
        "CUDA's own": found.overhead,
    }
    listed = ", ".join(f"{in_units(size)} {name}" for name, size in parts.items() if size)
    panel = f"memory of one device while a panel is drawn: {in_units(found.panel)}"
    return [
        f"memory of one device in a step: {in_units(found.training)} ({listed})",
        *([panel] if found.panel else []),
        f"disk of the checkpoints: {in_units(found.checkpoints)}, "
        f"{in_units(needs.checkpoint)} each, with one that is being written",
        f"{needs.flops / 1e18:.3g} EFLOPs over all devices",
    ]
