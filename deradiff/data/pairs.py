"""Training data, map style: captioned images and preference pairs, each item with the seed of its own random choices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from deradiff.data.tables import IMAGE_COLUMNS, PAIR_COLUMNS, decode, read_table


def generator_of(seed: int, epoch: int, index: int) -> torch.Generator:
    """The random choices of one example in one epoch: they depend on nothing else, so neither ranks, batches nor a resume change them."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class CaptionedImages:
    """Rows (`image`, `caption`), read lazily; `captions` are held in memory. Raises ValueError where no usable row is found."""

    columns: tuple[str, ...] = IMAGE_COLUMNS

    def __init__(self, source: str, split: str = "train", revision: str | None = None, limit: int | None = None) -> None:
        self.source = source
        self.rows = self.select(read_table(source, split, self.columns, revision))
        if limit is not None:
            self.rows = self.rows.select(range(min(limit, len(self.rows))))
        if len(self.rows) == 0:
            raise ValueError(f"{source} holds no usable row")
        self.fingerprint: str = self.rows._fingerprint
        self.captions: list[str] = list(self.rows["caption"])

    def select(self, rows: Any) -> Any:
        """The rows that can be used: those with a caption."""
        captioned = [i for i, caption in enumerate(rows["caption"]) if caption is not None]
        return rows if len(captioned) == len(rows) else rows.select(captioned)

    def __len__(self) -> int:
        return len(self.rows)

    def pictures(self, index: int) -> list[Image.Image]:
        return [self.picture(index, "image")]

    def picture(self, index: int, column: str) -> Image.Image:
        """One picture, decoded. Raises ValueError that names the row of a broken one."""
        try:
            return decode(self.rows[index][column])
        except OSError as error:
            raise ValueError(
                f"{self.source}: {column} of row {index} (of those used) is no picture that can be decoded: {error}"
            ) from error


class Pairs(CaptionedImages):
    """Rows in Pick-a-Pic's columns, winner first. Ties (label_0 = .5) and rows without a label are dropped and counted in `dropped`."""

    columns = PAIR_COLUMNS

    def select(self, rows: Any) -> Any:
        rows = super().select(rows)
        label = np.array(rows.with_format("numpy")["label_0"], dtype=float)
        if "has_label" in rows.column_names:
            label = np.where(np.array(rows["has_label"], dtype=bool), label, np.nan)
        decided = np.flatnonzero((label == 0) | (label == 1))
        self.dropped = len(rows) - len(decided)
        if len(decided) == 0:
            raise ValueError(f"{self.source} has no pair with a winner: every label_0 is a tie or missing")
        return rows if self.dropped == 0 else rows.select(decided)

    def pictures(self, index: int) -> list[Image.Image]:
        first, second = self.picture(index, "jpg_0"), self.picture(index, "jpg_1")
        return [first, second] if self.rows[index]["label_0"] == 1 else [second, first]


def pixels(image: Image.Image, resolution: int) -> Tensor:
    """(3, R, R) in [-1, 1]: the shorter side resized to R, the centre kept."""
    square = ImageOps.fit(image, (resolution, resolution), method=Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 127.5 - 1


@dataclass
class Item:
    """One training example in one epoch. generator: the source of its every random choice."""

    data: CaptionedImages
    index: int
    generator: torch.Generator

    @property
    def caption(self) -> str:
        return self.data.captions[self.index]

    @property
    def images(self) -> list[Image.Image]:
        """The example's pictures, decoded now; winner first where there are two."""
        return self.data.pictures(self.index)


@dataclass
class Examples:
    """Where training draws its examples from."""

    data: CaptionedImages
    seed: int

    def item(self, epoch: int, index: int) -> Item:
        return Item(self.data, index, generator_of(self.seed, epoch, index))


def schedule(count: int, seed: int, pairs_per_step: int, step: int) -> Iterator[tuple[int, int]]:
    """The (epoch, index) of each example of one optimiser step: consecutive places in an endless row of shuffled epochs.

    A function of its arguments alone, so a resumed run needs no replay and two ranks cannot disagree.
    """
    for place in range(step * pairs_per_step, (step + 1) * pairs_per_step):
        epoch, offset = divmod(place, count)
        yield epoch, int(_permutation(count, seed, epoch)[offset])


_permutations: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    key = (count, seed, epoch)
    if key not in _permutations:
        if len(_permutations) > 1:
            _permutations.pop(next(iter(_permutations)))
        _permutations[key] = np.random.default_rng([seed, epoch]).permutation(count)
    return _permutations[key]
