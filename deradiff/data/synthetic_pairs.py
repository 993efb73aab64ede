"""Preference pairs without human labels: pictures of one caption, found or sampled, and a scorer that says which is preferred.

Both are written in parts, each whole or not at all: an interrupted run goes on where it stopped, and processes share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from deradiff.data.locks import Locks
from deradiff.data.pairs import CaptionedImages, generator_of
from deradiff.data.tables import encode_png, write_pair_table, write_table
from deradiff.scorers.base import Scorer

PART = 64  # pairs of one file


def write_sampled_images(
    folder: Path,
    load: Callable[[], Any],
    prompts: Sequence[str],
    count: int,
    *,
    seed: int = 0,
    batch_size: int = 8,
    **call: Any,
) -> None:
    """Two pictures of a prompt for each of `count` pairs, as captioned images: rows 2i and 2i + 1 are pair i, of prompt i % len(prompts).

    load: makes the text-to-image pipeline, any of diffusers', and is not called where nothing is missing. call: goes to the pipeline
    (num_inference_steps, guidance_scale, height, width). A picture depends on (seed, i, which of the two) alone, not on batches or ranks.
    """
    pipe = None

    def part(rows: range, file: Path) -> None:
        nonlocal pipe
        pipe = pipe or load()
        wanted = [(i, side) for i in rows for side in (0, 1)]
        images: list[Any] = []
        for start in range(0, len(wanted), batch_size):
            some = wanted[start : start + batch_size]
            generators = [generator_of(seed, i, side) for i, side in some]
            images += pipe(
                prompt=[prompts[i % len(prompts)] for i, _ in some], generator=generators, **call
            ).images
        write_table(
            file,
            {
                "image": [encode_png(i) for i in images],
                "caption": [prompts[i % len(prompts)] for i, _ in wanted],
            },
        )

    _in_parts(folder, count, part, "sampling pairs")


def consecutive_pairs(images: CaptionedImages) -> np.ndarray:
    """(N, 2): the rows 2i and 2i + 1, as `write_sampled_images` left them."""
    return np.arange(len(images)).reshape(-1, 2)


def drawn_pairs(images: CaptionedImages, count: int, seed: int = 0) -> np.ndarray:
    """(count, 2): rows of different pictures that share a caption, drawn at random. Raises ValueError where no caption has two."""
    rng = np.random.default_rng(seed)
    by_caption: dict[str, list[int]] = {}
    for index, caption in enumerate(images.captions):
        by_caption.setdefault(caption, []).append(index)
    groups = [rows for rows in by_caption.values() if len(rows) > 1]
    if not groups:
        raise ValueError(
            f"{images.source} has no caption with two pictures, so there is nothing to compare"
        )
    share = np.array([len(rows) for rows in groups]) / sum(len(rows) for rows in groups)
    return np.array(
        [rng.choice(groups[g], 2, replace=False) for g in rng.choice(len(groups), count, p=share)]
    )


def write_scored_pairs(
    folder: Path,
    images: CaptionedImages,
    pairs: np.ndarray,
    load: Callable[[], Scorer],
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Pick-a-Pic's columns, and score_0 and score_1, of pairs (N, 2) of `images`' rows.

    temperature 0: the higher score is preferred, equal ones are ties (label .5). Above: a Bradley-Terry draw, image 0 being preferred with
    probability sigmoid((score_0 - score_1) / temperature), in units of the scorer. load: makes the scorer where something is missing.
    Raises ValueError for a temperature below 0 and for a picture that cannot be decoded.
    """
    if temperature < 0:
        raise ValueError(f"the temperature must be 0, for hard labels, or above, not {temperature}")
    score: Scorer | None = None

    def part(rows: range, file: Path) -> None:
        nonlocal score
        score = score or load()
        captions = [images.captions[int(pairs[i][0])] for i in rows]
        sides = [[images.pictures(int(pairs[i][side]))[0] for i in rows] for side in (0, 1)]
        first, second = (score(side, captions) for side in sides)
        label = bradley_terry(first - second, temperature, seed, rows)
        jpg_0, jpg_1 = ([encode_png(i) for i in side] for side in sides)
        write_pair_table(
            file,
            jpg_0,
            jpg_1,
            label.tolist(),
            captions,
            score_0=first.tolist(),
            score_1=second.tolist(),
        )

    _in_parts(folder, len(pairs), part, "labelling pairs")


def bradley_terry(difference: Tensor, temperature: float, seed: int, rows: Sequence[int]) -> Tensor:
    """(N,) label of the first picture: 0, .5 or 1. difference: (N,) of scores; a row's draw depends on (seed, row) alone."""
    if temperature == 0:
        return (difference.sign() + 1) / 2
    drawn = torch.cat([torch.rand(1, generator=generator_of(seed, row, 2)) for row in rows])
    return (drawn < torch.sigmoid(difference / temperature)).float()


def _in_parts(folder: Path, count: int, write: Callable[[range, Path], None], told: str) -> None:
    numbers = [n for n in range(-(-count // PART)) if not _part(folder, n).is_file()]
    with (
        Locks(folder / ".lock") as locks,
        tqdm(total=len(numbers), desc=told, unit="part", disable=not numbers, leave=False) as bar,
    ):
        for number in locks.share(numbers):
            if not _part(folder, number).is_file():  # unless another process wrote it meanwhile
                write(range(number * PART, min((number + 1) * PART, count)), _part(folder, number))
            bar.update()


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.parquet"
