"""Training data, map style: captioned images and preference pairs, each item with the seed of its own random choices."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from deradiff.data.tables import CHOICE_COLUMNS, IMAGE_COLUMNS, PAIR_COLUMNS, decode, open_table

log = logging.getLogger(__name__)
Place = tuple[int, int]  # (epoch, example)


def generator_of(seed: int, epoch: int, index: int) -> torch.Generator:
    """The random choices of one example in one epoch: they depend on nothing else, so neither ranks, batches nor a resume change them."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class BrokenPicture(ValueError):
    """A picture that cannot be decoded; its message names the file, the column and the row."""


class CaptionedImages:
    """Rows (`image`, `caption`), read lazily; `captions` are held in memory.

    max_broken: the share of rows whose pictures may fail to decode before the run stops; such a row is skipped, named in the log and kept
    in `broken`. Raises ValueError where no usable row is found, or a column is missing.
    """

    forms: tuple[tuple[str, ...], ...] = (IMAGE_COLUMNS,)

    def __init__(
        self,
        source: str,
        split: str = "train",
        revision: str | None = None,
        limit: int | None = None,
        *,
        streaming: bool = False,
        max_broken: float = 0.01,
    ) -> None:
        self.source, self.max_broken = source, max_broken
        self.table = open_table(source, split, revision, streaming)
        self.columns = self._form()
        captions = self.table.column("caption")
        captioned = np.array([caption is not None for caption in captions], dtype=bool)
        self.uncaptioned = int((~captioned).sum())
        self.rows = np.flatnonzero(self.usable(captioned))[:limit]  # of the table, by number
        if len(self.rows) == 0:
            raise ValueError(f"{source} holds no usable row")
        self.captions: list[str] = [captions[row] for row in self.rows]
        self.fingerprint = (
            f"{self.table.fingerprint}-{hashlib.sha256(self.rows.tobytes()).hexdigest()[:16]}"
        )
        self.broken: dict[int, str] = {}

    def _form(self) -> tuple[str, ...]:
        for form in self.forms:
            if set(form) <= set(self.table.columns):
                return form
        missing = [c for c in self.forms[0] if c not in self.table.columns]
        other = "".join(f", nor are there {', '.join(form)}" for form in self.forms[1:])
        raise ValueError(
            f"{self.source} lacks the column {', '.join(missing)}{other}; it has {', '.join(self.table.columns)}"
        )

    def usable(self, captioned: np.ndarray) -> np.ndarray:
        """Which rows of the table can be used: those with a caption."""
        return captioned

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def blocks(self) -> np.ndarray | None:
        """(2, N) the shard and the row group of each example, where those that lie together should be read together."""
        return None if self.table.blocks is None else self.table.blocks[:, self.rows]

    def pictures(self, index: int) -> list[Image.Image]:
        """The pictures of an example, decoded. Raises BrokenPicture."""
        return self._decoded(index, self.table.row(int(self.rows[index])), "image")

    def _decoded(self, index: int, row: dict[str, Any], *columns: str) -> list[Image.Image]:
        pictures = []
        for column in columns:
            try:
                pictures.append(decode(row[column]))
            except OSError as error:
                raise BrokenPicture(
                    f"{self.source}: {column} of row {self.rows[index]} is no picture that can be decoded: {error}"
                ) from error
        return pictures

    def skip(self, index: int, why: str) -> None:
        """Leave an example out from here on. Raises ValueError where more than `max_broken` of all have been."""
        if index in self.broken:
            return
        self.broken[index] = why
        log.warning("skipped (%d so far): %s", len(self.broken), why)
        if len(self.broken) > self.max_broken * len(self):
            raise ValueError(
                f"{len(self.broken)} of {len(self)} rows have no picture that can be decoded, more than data.max_broken="
                f"{self.max_broken:g} allows; the last: {why}"
            )

    def instead_of(self, index: int) -> int:
        """The example itself, or where it is broken the next that is not."""
        while index in self.broken:
            index = (index + 1) % len(self)
        return index


class Pairs(CaptionedImages):
    """Rows in Pick-a-Pic's columns, or (`winner`, `loser`, `caption`). Ties (label_0 = .5) and rows without a label are dropped, and
    counted in `ties` and `unlabelled`."""

    forms = (PAIR_COLUMNS, CHOICE_COLUMNS)

    def usable(self, captioned: np.ndarray) -> np.ndarray:
        self.ties = self.unlabelled = 0
        self.label = np.ones(len(captioned))
        if self.columns == CHOICE_COLUMNS:
            return captioned
        self.label = np.array(self.table.column("label_0"), dtype=float)
        if "has_label" in self.table.columns:
            self.label[~np.array(self.table.column("has_label"), dtype=bool)] = np.nan
        decided = (self.label == 0) | (self.label == 1)
        self.unlabelled = int((captioned & np.isnan(self.label)).sum())
        self.ties = int((captioned & ~decided).sum()) - self.unlabelled
        if not decided.any():
            raise ValueError(
                f"{self.source} has no pair with a winner: every label_0 is a tie or missing"
            )
        return captioned & decided

    def pictures(self, index: int) -> list[Image.Image]:
        """[winner, loser]."""
        row = self.table.row(int(self.rows[index]))
        if self.columns == CHOICE_COLUMNS:
            return self._decoded(index, row, "winner", "loser")
        first, second = self._decoded(index, row, "jpg_0", "jpg_1")
        return [first, second] if self.label[self.rows[index]] == 1 else [second, first]


def pixels(image: Image.Image, resolution: int, flip: bool = False) -> Tensor:
    """(3, R, R) in [-1, 1]: the shorter side resized to R, the centre kept, and mirrored where `flip` is set."""
    square = ImageOps.fit(image, (resolution, resolution), method=Image.Resampling.BICUBIC)
    square = ImageOps.mirror(square) if flip else square
    return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 127.5 - 1


@dataclass
class Item:
    """One training example in one epoch. place: where the schedule put it; generator: the source of its every random choice."""

    data: CaptionedImages
    index: int
    place: Place
    generator: torch.Generator

    @property
    def caption(self) -> str:
        return self.data.captions[self.index]

    @property
    def images(self) -> list[Image.Image]:
        """The example's pictures, decoded now; winner first where there are two. A broken one is marked, and raises BrokenPicture."""
        try:
            return self.data.pictures(self.index)
        except BrokenPicture as broken:
            self.data.skip(self.index, str(broken))
            raise


@dataclass
class Examples:
    """Where training draws its examples from, and in which order.

    in_blocks: examples that lie together in a streamed table come together, for a run that decodes pictures as it goes.
    """

    data: CaptionedImages
    seed: int
    in_blocks: bool = False

    def item(self, epoch: int, index: int) -> Item:
        return Item(
            self.data,
            self.data.instead_of(index),
            (epoch, index),
            generator_of(self.seed, epoch, index),
        )

    def batch(self, collate: Callable[[list[Item]], Any], places: list[Place]) -> Any:
        """The collated examples of these places; where a picture turns out to be broken, its row is skipped and the next one taken."""
        while True:
            try:
                return collate([self.item(*place) for place in places])
            except BrokenPicture:  # `Item.images` has marked it
                continue

    def span(self, start: int, stop: int) -> np.ndarray:
        """(2, stop - start): the epoch and the example at consecutive positions of an endless row of shuffled epochs.

        A function of its arguments, the data and the seed alone, so a resumed run needs no replay and two ranks cannot disagree.
        """
        count = len(self.data)
        epoch, offset = np.divmod(np.arange(start, stop), count)
        blocks = self.data.blocks if self.in_blocks else None
        index = np.empty_like(epoch)
        for e in np.unique(epoch):
            index[epoch == e] = _permutation(count, self.seed, int(e), blocks)[offset[epoch == e]]
        return np.stack([epoch, index])

    def places(self, start: int, stop: int) -> list[Place]:
        """The same as (epoch, example) pairs: what a micro-batch takes."""
        return [(int(e), int(i)) for e, i in self.span(start, stop).T]


_permutations: dict[tuple[int, int, int, bool], np.ndarray] = {}


def _permutation(count: int, seed: int, epoch: int, blocks: np.ndarray | None) -> np.ndarray:
    """All examples in random order; of a streamed table its shards, the row groups within each, and the rows within each of these."""
    key = (count, seed, epoch, blocks is None)
    if key not in _permutations:
        if len(_permutations) > 1:
            _permutations.pop(next(iter(_permutations)))
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(count)
        if blocks is not None:
            shard, group = (rng.permutation(int(ids.max()) + 1)[ids] for ids in blocks)
            order = np.lexsort((order, group, shard))
        _permutations[key] = order
    return _permutations[key]
