"""Training examples: captioned images and preference pairs, and the order in which a run sees them.

Every random choice of an example is a function of (seed, epoch, example) alone.
"""

from __future__ import annotations

import hashlib
import logging
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from deradiff.data.tables import CHOICE_COLUMNS, IMAGE_COLUMNS, PAIR_COLUMNS, open_table
from deradiff.image_files import UnreadableImage
from deradiff.image_tables import image_of_cell

log = logging.getLogger(__name__)


SHOWN_VALUES = 5
"""How many values of a column an error names."""

MEANINGS = {
    "label_0": "give 1 where the first image is preferred, 0 where the second is, 0.5 for a tie",
    "has_label": "give true or false, or 1 or 0",
}
"""What the values of a column mean, for messages."""


class EpochIndex(NamedTuple):
    """An example in one epoch.

    Attributes:
        epoch: counted from 0.
        example: number of the example in the data.
    """

    epoch: int
    example: int


def generator_of(seed: int, epoch: int, index: int) -> torch.Generator:
    """The generator of an example in one epoch.

    It depends on nothing else, so ranks, batch sizes and a resumed run change no random choice.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


EncodedImages = Sequence[tuple[str, Any]]
"""Encoded images, each with the name of its column."""


class BrokenImage(ValueError):
    """An image that cannot be decoded; the message names the table, the column and the row."""


class CaptionedImages:
    """Captioned images, in the columns `image` and `caption`. Images are read when asked for.

    Args:
        path: a parquet file, a folder, or a data set of the hub; see `open_table`.
        split: a split of the folder or of the data set.
        revision: a branch, tag or commit of the hub.
        limit: use the first so many usable rows; None: all.
        streaming: read parquet where it is.
        max_broken: the share of examples whose images may fail to decode. Such an example is
            skipped and named in the log; more of them raise ValueError.

    Attributes:
        path: as passed.
        table: the rows, usable or not.
        columns: the columns that are read.
        rows: (N,) the usable rows of the table.
        captions: of the N examples.
        missing_captions: number of rows without a caption; they are not usable.
        fingerprint: a digest of the table's content and of the rows that are used.
        rows_digest: of the rows that are used and what the small columns say of them; it is the
            same on every machine that has a copy of the table.
        broken: skipped examples, with the reason.

    Raises:
        ValueError: where a column is missing, or no row is usable.
    """

    column_forms: tuple[tuple[str, ...], ...] = (IMAGE_COLUMNS,)
    images_per_example = 1

    def __init__(
        self,
        path: str,
        split: str = "train",
        revision: str | None = None,
        limit: int | None = None,
        *,
        streaming: bool = False,
        max_broken: float = 0.01,
    ) -> None:
        self.path = path
        self.max_broken = max_broken
        self.broken: dict[int, str] = {}

        # The table, and which of its rows can be used.
        self.table = open_table(path, split, revision, streaming)
        self.columns = self._columns()
        if len(self.table) == 0:
            raise ValueError(f"{path} has no row")
        captions = self._captions()
        has_caption = np.array([caption is not None for caption in captions], dtype=bool)
        self.missing_captions = int((~has_caption).sum())
        self.rows = np.flatnonzero(self.usable_rows(has_caption))[:limit]
        if len(self.rows) == 0:
            raise ValueError(f"{path} has no usable row")

        # What a run reads of these rows, and what names them.
        self.captions: list[str] = [captions[row] for row in self.rows]
        self.rows_digest = self._digest()
        self.fingerprint = f"{self.table.fingerprint}-{self.rows_digest}"

    def _digest(self) -> str:
        """A digest of the rows that are used, and of what the small columns say of them.

        A file may be changed and keep its size and time.
        """
        digest = hashlib.sha256(self.rows.tobytes())
        for caption in self.captions:
            digest.update(f"{len(caption)} {caption}".encode(errors="surrogatepass"))
        return digest.hexdigest()[:16]

    def _columns(self) -> tuple[str, ...]:
        """The first of the column forms that the table has."""
        present = self.table.columns
        for form in self.column_forms:
            if set(form) <= set(present):
                return form
        missing = [name for name in self.column_forms[0] if name not in present]
        others = [", ".join(form) for form in self.column_forms[1:]]
        alternatives = "".join(f", nor are there {names}" for names in others)
        raise ValueError(
            f"{self.path} lacks the column {', '.join(missing)}{alternatives}; "
            f"it has {', '.join(present)}"
        )

    def _captions(self) -> list[str | None]:
        """The captions of all rows. Raises ValueError for what is no text."""
        captions = self._column("caption")
        for row, caption in enumerate(captions):
            if not isinstance(caption, str | None):
                raise ValueError(
                    f"{self.path}: caption of row {row} is a {type(caption).__name__} "
                    f"({reprlib.repr(caption)}): give a table whose captions are texts, one in "
                    "each row"
                )
        return captions

    def _column(self, name: str) -> list[Any]:
        """A column of small values of all rows. Raises ValueError where it is torn."""
        try:
            return self.table.column(name)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path}: {name} holds text that is no UTF-8 ({error.reason}): write the "
                "table again"
            ) from error

    def usable_rows(self, has_caption: np.ndarray) -> np.ndarray:
        """Which rows of the table can be used, as a mask: those with a caption.

        Args:
            has_caption: (rows,) mask.
        """
        return has_caption

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def blocks(self) -> np.ndarray | None:
        """(2, N): the shard and the row group of each example; see `RowSource.blocks`."""
        blocks = self.table.blocks
        return None if blocks is None else blocks[:, self.rows]

    def images(self, index: int) -> list[Image.Image]:
        """The images of an example, decoded: of a pair the winner, then the loser.

        Raises:
            BrokenImage: where one cannot be decoded.
        """
        return self.decode(index, self.encoded_images(index))

    def encoded_images(self, index: int) -> EncodedImages:
        """The images of an example as the table holds them, each with the name of its column.

        One thread at a time may read.
        """
        row = self.table.row(int(self.rows[index]))
        return [(column, row[column]) for column in self.image_columns(index)]

    def image_columns(self, index: int) -> Sequence[str]:
        """The columns that hold the images of an example, in order."""
        return ["image"]

    def decode(self, index: int, encoded: EncodedImages) -> list[Image.Image]:
        """The images of an example. Several threads may decode at once.

        Args:
            index: number of the example.
            encoded: of `encoded_images`.

        Raises:
            BrokenImage: where one cannot be decoded.
        """
        images = []
        for column, content in encoded:
            try:
                images.append(image_of_cell(content))
            except UnreadableImage as error:
                raise BrokenImage(
                    f"{self.path}: {column} of row {self.rows[index]} is not an image "
                    f"that can be decoded: {error}"
                ) from error
        return images

    def skip(self, index: int, reason: str) -> None:
        """Skip an example from now on.

        Raises:
            ValueError: where more than `max_broken` of all examples are skipped.
        """
        if index in self.broken:
            return
        self.broken[index] = reason
        log.warning("skipped (%d so far): %s", len(self.broken), reason)
        if len(self.broken) > self.max_broken * len(self):
            raise ValueError(
                f"{len(self.broken)} of {len(self)} rows have an image that cannot be decoded, "
                f"more than max_broken={self.max_broken:g} allows; the last: {reason}"
            )

    def replacement(self, index: int) -> int:
        """The example itself; if it is broken, the next one that is not."""
        while index in self.broken:
            index = (index + 1) % len(self)
        return index


class Pairs(CaptionedImages):
    """Preference pairs, in the columns of Pick-a-Pic or as `winner`, `loser` and `caption`.

    Ties (label_0 = 0.5) and rows without a label are not usable.

    Attributes:
        label: (rows,) of the table: 1 where the first image is the winner, 0 where the second is,
            0.5 for a tie, NaN without a label.
        ties: number of ties.
        missing_labels: number of rows without a label.
    """

    column_forms = (PAIR_COLUMNS, CHOICE_COLUMNS)
    images_per_example = 2

    def usable_rows(self, has_caption: np.ndarray) -> np.ndarray:
        """Which rows of the table have a caption and a winner, as a mask."""
        # In the columns winner and loser, the first image of every row is the winner.
        self.ties = 0
        self.missing_labels = 0
        self.label = np.ones(len(has_caption))
        if self.columns == CHOICE_COLUMNS:
            return has_caption

        # In Pick-a-Pic's columns, the label decides. Where there is none, label_0 means nothing.
        labels = self._column("label_0")
        if "has_label" in self.table.columns:
            has_label = self._column("has_label")
            self._check_values("has_label", has_label, (True, False))
            labels = [label if has == 1 else None for label, has in zip(labels, has_label)]
        self._check_values("label_0", labels, (1, 0, 0.5))
        self.label = np.array(labels, dtype=float)

        # A row that has a caption but no winner is a tie, or has no label.
        has_winner = (self.label == 0) | (self.label == 1)
        self.missing_labels = int((has_caption & np.isnan(self.label)).sum())
        self.ties = int((has_caption & ~has_winner).sum()) - self.missing_labels
        if not has_winner.any():
            raise ValueError(
                f"{self.path} has no pair with a winner: every label_0 is a tie or missing"
            )
        return has_caption & has_winner

    def _check_values(self, name: str, values: list[Any], known: tuple[float, ...]) -> None:
        """Raise ValueError for other values than the known ones; null and NaN say nothing."""
        for row, value in enumerate(values):
            is_number = isinstance(value, int | float)
            if value is None or (is_number and (value in known or value != value)):
                continue
            found = ", ".join(sorted({reprlib.repr(value) for value in values})[:SHOWN_VALUES])
            raise ValueError(
                f"{self.path}: {name} of row {row} is {reprlib.repr(value)}, and the column has "
                f"the values {found}: {MEANINGS[name]}"
            )

    def _digest(self) -> str:
        winners = hashlib.sha256(self.label[self.rows].tobytes()).hexdigest()[:8]
        return f"{super()._digest()}-{winners}"

    def image_columns(self, index: int) -> Sequence[str]:
        """The columns of the winner and of the loser of an example."""
        first, second = self.columns[:2]
        first_is_winner = self.label[self.rows[index]] == 1
        return [first, second] if first_is_winner else [second, first]


def image_tensor(image: Image.Image, resolution: int, flip: bool = False) -> Tensor:
    """An image as (3, R, R) in [-1, 1]: its shorter side resized to R, the centre cropped.

    Args:
        image: of any size.
        resolution: R, in pixels.
        flip: mirror it.
    """
    square = ImageOps.fit(image, (resolution, resolution), method=Image.Resampling.BICUBIC)
    if flip:
        square = ImageOps.mirror(square)
    values = torch.from_numpy(np.asarray(square).copy())
    return values.permute(2, 0, 1).float() / 127.5 - 1


@dataclass
class Item:
    """One training example in one epoch.

    Attributes:
        data: where it is from.
        index: number of the example in the data.
        epoch_index: as the order of the run has it; its index is another one where the example of
            that index is broken and was replaced.
        generator: for all its random choices.
    """

    data: CaptionedImages
    index: int
    epoch_index: EpochIndex
    generator: torch.Generator

    @property
    def caption(self) -> str:
        """Its caption."""
        return self.data.captions[self.index]

    @property
    def images(self) -> list[Image.Image]:
        """Its images, decoded now; the winner first, if there are two.

        Raises:
            BrokenImage: where one cannot be decoded. The example is then skipped from now on.
        """
        try:
            return self.data.images(self.index)
        except BrokenImage as broken:
            self.data.skip(self.index, str(broken))
            raise


@dataclass
class Examples:
    """The examples of a run in its order: shuffled epochs, one after another.

    Attributes:
        data: the examples.
        seed: of the order, and of the random choices of every example.
        in_blocks: keep examples of one block of a streamed table together. For runs that decode
            images at every step.
    """

    data: CaptionedImages
    seed: int
    in_blocks: bool = False

    def item(self, epoch: int, index: int) -> Item:
        """An example in one epoch; the next one, if its images are known to be broken."""
        return Item(
            self.data,
            self.data.replacement(index),
            EpochIndex(epoch, index),
            generator_of(self.seed, epoch, index),
        )

    def batch(self, collate: Callable[[list[Item]], Any], epoch_indices: list[EpochIndex]) -> Any:
        """A batch of examples.

        It takes the function that collates, because an image may turn out to be broken while the
        batch is made: its example is skipped, and the batch is made again with the next one.

        Args:
            collate: makes a batch of examples.
            epoch_indices: of the examples.
        """
        while True:
            try:
                return collate([self.item(*epoch_index) for epoch_index in epoch_indices])
            # `Item.images` has marked the example as broken: the next try takes another one.
            except BrokenImage:
                continue

    def span(self, start: int, stop: int) -> np.ndarray:
        """The examples at positions `start` to `stop` of the run, counted over all epochs.

        They are a function of the positions, the data and the seed alone: a resumed run needs no
        replay, and ranks cannot disagree.

        Returns:
            (2, stop - start): epochs and indices.
        """
        # Each position lies in one epoch, and has an offset into the order of that epoch.
        count = len(self.data)
        epochs, offsets = np.divmod(np.arange(start, stop), count)
        blocks = self.data.blocks if self.in_blocks else None
        indices = np.empty_like(epochs)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            order = _permutation(count, self.seed, int(epoch), blocks)
            indices[in_epoch] = order[offsets[in_epoch]]
        return np.stack([epochs, indices])

    def epoch_indices(self, start: int, stop: int) -> list[EpochIndex]:
        """The same examples as a list, for `batch`."""
        return [EpochIndex(int(epoch), int(index)) for epoch, index in self.span(start, stop).T]


# The two latest permutations, since a batch may hold the end of one epoch and the start of the next
_permutations: dict[tuple[int, int, int, bool], np.ndarray] = {}


def _permutation(count: int, seed: int, epoch: int, blocks: np.ndarray | None) -> np.ndarray:
    """All examples in random order.

    With blocks: the shards in random order, the row groups of each, and the rows of each of these.
    """
    key = (count, seed, epoch, blocks is None)
    if key not in _permutations:
        if len(_permutations) > 1:
            _permutations.pop(next(iter(_permutations)))

        # Rows are sorted by the place of their shard, then of their row group, then their own.
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(count)
        if blocks is not None:
            shard_order, group_order = (rng.permutation(int(ids.max()) + 1)[ids] for ids in blocks)
            order = np.lexsort((order, group_order, shard_order))
        _permutations[key] = order
    return _permutations[key]
