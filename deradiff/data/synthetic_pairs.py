"""Preference pairs without human labels: two images of one caption, and a scorer that prefers one.

The images are sampled, or chosen among images that exist. Both images and labels are written in
parts, each completely or not at all: an interrupted run continues where it stopped, and processes
share the work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deradiff.data.pairs import CaptionedImages, generator_of
from deradiff.data.part_files import Advance, PartFiles
from deradiff.image_tables import encode_png, write_pair_table, write_table

PART = 64
"""Pairs of one file."""

LABEL_STREAM = 2
"""Numbers the random choices of a pair: 0 and 1 are the noise of its images, 2 is its label."""

Score = Callable[[list[Image.Image], list[str]], Tensor]
"""From images and their captions to scores (N,)."""


def write_sampled_images(
    folder: Path,
    load: Callable[[], Any],
    prompts: Sequence[str],
    count: int,
    *,
    seed: int = 0,
    batch_size: int = 8,
    negative_prompt: str | None = None,
    **call: Any,
) -> None:
    """Sample two images for each of `count` pairs, and write them as captioned images.

    Rows 2i and 2i + 1 are pair i, of prompt i % len(prompts). An image depends on the seed, on i
    and on which of the two it is, not on batches or ranks.

    Args:
        folder: of the parquet files.
        load: makes a text-to-image pipeline of diffusers; not called where nothing is missing.
        prompts: one or more.
        count: number of pairs.
        seed: of the noise.
        batch_size: images of one call of the pipeline.
        negative_prompt: of every image; None: the pipeline's own, or none.
        call: further arguments of the pipeline, such as num_inference_steps, height and width.
    """
    pipe = functools.cache(load)

    def write(pairs: range, file: Path, advance: Advance) -> None:
        # Two images of each pair, with the same prompt and different noise.
        captions = []
        generators = []
        for pair in pairs:
            for side in (0, 1):
                captions.append(prompts[pair % len(prompts)])
                generators.append(generator_of(seed, pair, side))

        # They are sampled in batches, and encoded as PNG.
        images: list[Image.Image] = []
        for start in range(0, len(captions), batch_size):
            batch = slice(start, start + batch_size)
            options = dict(call)
            if negative_prompt is not None:
                options["negative_prompt"] = [negative_prompt] * len(captions[batch])
            output = pipe()(prompt=captions[batch], generator=generators[batch], **options)
            images += output.images
            advance(len(images) // 2 - (len(images) - len(output.images)) // 2)
        write_table(file, {"image": _encode_all(images), "caption": captions})

    _parts(folder, count).write_missing(write, "sampling pairs", unit="pair")


def consecutive_pairs(images: CaptionedImages) -> np.ndarray:
    """The pairs that `write_sampled_images` wrote.

    Returns:
        (N, 2) rows of `images`.
    """
    return np.arange(len(images)).reshape(-1, 2)


def random_pairs(images: CaptionedImages, count: int, seed: int = 0) -> np.ndarray:
    """Random pairs of different images that share a caption.

    Args:
        images: the images to choose from.
        count: number of pairs.
        seed: of the choice.

    Returns:
        (count, 2) rows of `images`.

    Raises:
        ValueError: where no caption has two images.
    """
    # The images of each caption that has at least two.
    rows_of_caption: dict[str, list[int]] = {}
    for row, caption in enumerate(images.captions):
        rows_of_caption.setdefault(caption, []).append(row)
    groups = [rows for rows in rows_of_caption.values() if len(rows) > 1]
    if not groups:
        raise ValueError(
            f"{images.path} has no caption with two images, so there is nothing to compare"
        )

    # A caption is chosen in proportion to its images, then two of them.
    rng = np.random.default_rng(seed)
    sizes = np.array([len(rows) for rows in groups])
    chosen = rng.choice(len(groups), count, p=sizes / sizes.sum())
    return np.array([rng.choice(groups[group], 2, replace=False) for group in chosen])


def write_scored_pairs(
    folder: Path,
    images: CaptionedImages,
    pairs: np.ndarray,
    load: Callable[[], Score],
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Label pairs by a scorer, and write them in Pick-a-Pic's columns, with score_0 and score_1.

    Args:
        folder: of the parquet files.
        images: captioned images.
        pairs: (N, 2) rows of `images`.
        load: makes the scorer; not called where nothing is missing.
        temperature: see `bradley_terry`.
        seed: of the labels.

    Raises:
        ValueError: for a temperature below 0, and for an image that cannot be decoded.
    """
    if temperature < 0:
        raise ValueError(f"the temperature must be 0, for hard labels, or above, not {temperature}")
    score = functools.cache(load)

    def write(numbers: range, file: Path, advance: Advance) -> None:
        # The images of the pairs, and their scores.
        captions = [images.captions[int(pairs[number][0])] for number in numbers]
        first_images = [images.images(int(pairs[number][0]))[0] for number in numbers]
        second_images = [images.images(int(pairs[number][1]))[0] for number in numbers]
        first_scores = score()(first_images, captions)
        second_scores = score()(second_images, captions)

        # The labels follow from the difference of the scores.
        label = bradley_terry(first_scores - second_scores, temperature, seed, numbers)
        write_pair_table(
            file,
            _encode_all(first_images),
            _encode_all(second_images),
            label.tolist(),
            captions,
            score_0=first_scores.tolist(),
            score_1=second_scores.tolist(),
        )
        advance(len(numbers))

    _parts(folder, len(pairs)).write_missing(write, "labelling pairs", unit="pair")


def bradley_terry(
    difference: Tensor, temperature: float, seed: int, numbers: Sequence[int]
) -> Tensor:
    """Labels of pairs: 1 where the first image is preferred, 0 where the second is, 0.5 for a tie.

    The random choice of a pair depends on the seed and its number alone.

    Args:
        difference: (N,) score of the first image minus that of the second.
        temperature: in units of the scores. 0: the higher score is preferred. Above 0: the first
            image is preferred with probability sigmoid(difference / temperature).
        seed: of the random choices.
        numbers: of the N pairs.

    Returns:
        (N,).
    """
    if temperature == 0:
        return (difference.sign() + 1) / 2
    generators = [generator_of(seed, number, LABEL_STREAM) for number in numbers]
    uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    return (uniform < torch.sigmoid(difference / temperature)).float()


def _encode_all(images: list[Image.Image]) -> list[bytes]:
    return [encode_png(image) for image in images]


def _parts(folder: Path, count: int) -> PartFiles:
    """The files of `count` pairs."""
    return PartFiles(folder / ".lock", partial(_part, folder), count, PART)


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.parquet"
