"""`data.dry_run=true`: what a run would read, and what it would need, before anything is downloaded or a weight is loaded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from deradiff.data.pairs import CaptionedImages, Examples, Pairs
from deradiff.data.sources import parquet_files
from deradiff.data.stream import ParquetStream
from deradiff.files import slug, write_atomic
from train.config import OBJECTIVES, TrainConfig
from train.data import counted
from train.disk import cache_need, check_disk, described, in_units, is_cached

SHOWN, SIDE, LINE = (
    3,
    256,
    20,
)  # examples in the picture, pixels of one of their pictures, and of their caption


def dry_run(config: TrainConfig) -> Path:
    """Print the counts and the needs of a run, write three of its examples as a picture, and return that file.

    Parquet is read where it lies: of a data set of the hub only the small columns, and the row groups of the examples that are shown.
    """
    data = config.data
    if data.source != "table":
        raise ValueError(
            f"data.dry_run=true shows rows that exist, and data.source={data.source} makes them first: run it without"
        )
    files = parquet_files(str(data.path), data.split, data.revision)
    reader = Pairs if OBJECTIVES[config.objective] else CaptionedImages
    rows = reader(
        str(data.path),
        data.split,
        data.revision,
        data.limit,
        streaming=files is not None,
        max_broken=1.0,
    )
    print(
        f"train: {data.path}, {data.split}: {counted(rows)}; {len(set(rows.captions))} distinct captions"
    )
    file = Path(config.runs) / "data" / f"{slug(f'{data.path}-{data.split}')}-dry-run.png"
    write_atomic(file, _png(Examples(rows, config.seed)))
    print(
        f"train: {SHOWN} of them, {'winner' if isinstance(rows, Pairs) else 'image'} first, are in {file}"
    )
    for line in _needs(config, rows):
        print(f"train: {line}")
    check_disk(config, rows)
    return file


def _png(examples: Examples) -> bytes:
    shown = [
        examples.batch(lambda items: (items[0].images, items[0].caption), [p])
        for p in examples.places(0, min(SHOWN, len(examples.data)))
    ]
    sheet = Image.new("RGB", (SIDE * len(shown[0][0]), (SIDE + LINE) * len(shown)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (pictures, caption) in enumerate(shown):
        for column, picture in enumerate(pictures):
            sheet.paste(
                ImageOps.contain(picture, (SIDE, SIDE)), (column * SIDE, row * (SIDE + LINE))
            )
        text = caption.encode("latin-1", "replace").decode(
            "latin-1"
        )  # what PIL's own font can draw
        draw.text((4, row * (SIDE + LINE) + SIDE + 4), text[: sheet.width // 6], fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _needs(config: TrainConfig, rows: CaptionedImages) -> list[str]:
    lines, data = [], config.data
    if isinstance(rows.table, ParquetStream):
        size, hub = rows.table.size, rows.table.shards[0].address.startswith("hf://")
        copied = (
            f"{in_units(2 * size)} of disk for its download and copy"
            if hub
            else f"{in_units(size)} of disk for its copy"
        )
        read = (
            "read where it lies"
            if data.streaming
            else f"{copied}, or none with data.streaming=true"
        )
        lines.append(f"data: {in_units(size)} of parquet, {read}")
    if is_cached(config):
        encodings, errors = (in_units(need) for need in cache_need(config, rows))
        lines.append(
            f"disk below {config.runs}/cache: {encodings} of latents and text embeddings, {errors} of reference errors"
        )
    if config.objective == "dpo":
        lines.append(_memory(config))
    return lines


def _memory(config: TrainConfig) -> str:
    from deradiff.models.published import GPUS, PAPER_GPU
    from deradiff.models.requirements import dpo_requirements

    family, denoiser, side = described(config)
    optim, lora = config.optim, _lora(config, family.lora_targets)
    needs = dpo_requirements(
        denoiser,
        side,
        side,
        config.steps,
        optim.batch_size * optim.accumulation,
        GPUS[PAPER_GPU].tflops,
        method=config.finetune.method,
        optimizer="adamw8bit" if optim.name.startswith("adamw8bit") else optim.name,
        checkpointing=config.model.gradient_checkpointing,
        batch=optim.batch_size,
        tokens=family.prompt_tokens,
        lora=lora,
    )
    parts = {"weights": needs.weights, "gradients": needs.gradients, "optimiser": needs.optimizer}
    parts[f"activations of {optim.batch_size} pairs, at the least"] = needs.activations
    return (
        f"memory of one device in half precision: {in_units(needs.memory)} ({', '.join(f'{in_units(v)} {k}' for k, v in parts.items())}); "
        f"{needs.flops / 1e18:.3g} EFLOPs, {needs.hours:.3g} A100-hours at 40 % of its peak, on one device"
    )


def _lora(config: TrainConfig, targets: tuple[str, ...]) -> Any:
    from peft import LoraConfig

    tune = config.finetune
    return (
        LoraConfig(r=tune.rank, lora_alpha=tune.alpha, target_modules=list(tune.targets or targets))
        if tune.method == "lora"
        else None
    )
