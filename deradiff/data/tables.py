"""The tables that training reads: captioned images, and preference pairs in two forms."""

from __future__ import annotations

from typing import Any, Protocol

import datasets
import numpy as np

from deradiff.data.sources import parquet_files
from deradiff.data.stream import ParquetStream

PAIR_COLUMNS = ("jpg_0", "jpg_1", "label_0", "caption")
"""Of Pick-a-Pic: two images, and which of them is preferred."""

CHOICE_COLUMNS = ("winner", "loser", "caption")

IMAGE_COLUMNS = ("image", "caption")


class RowSource(Protocol):
    """A table whose rows are read one at a time.

    Attributes:
        columns: names of the columns.
        fingerprint: a digest of the content.
    """

    columns: list[str]
    fingerprint: str

    @property
    def blocks(self) -> np.ndarray | None:
        """(2, rows): the shard and the row group of each row; rows of one block are read together.

        None where any order of reading is equally fast.
        """

    def __len__(self) -> int: ...

    def column(self, name: str) -> list[Any]:
        """A column of small values (captions, labels) of all rows."""

    def row(self, index: int) -> dict[str, Any]:
        """One row; its images are encoded bytes."""


def open_table(
    path: str, split: str = "train", revision: str | None = None, streaming: bool = False
) -> RowSource:
    """Open a table.

    Args:
        path: a parquet file, a folder of parquet files, a folder of images with a
            `metadata.jsonl` (`file_name`, `caption`), or a data set of the hub.
        split: a split of the folder or of the data set.
        revision: a branch, tag or commit of the hub.
        streaming: read parquet where it is, on this disk or on the hub. Otherwise it is
            downloaded, copied into arrow's format and mapped into memory.

    Raises:
        ValueError: for a path, split or revision that does not exist, and for streaming what is
            not parquet.
    """
    files = parquet_files(path, split, revision)
    if not streaming:
        return ArrowTable(path, split, revision, files)
    if files is None:
        raise ValueError(
            f"streaming=True reads parquet only, and {path} is not parquet: give streaming=False"
        )
    return ParquetStream(files)


class ArrowTable:
    """A `RowSource` in arrow's format, mapped into memory and read in any order.

    Args:
        path: a folder of images, or a data set of the hub; not read where `files` are given.
        split: of the data set.
        revision: of the data set.
        files: parquet files to read.
    """

    blocks = None

    def __init__(
        self, path: str, split: str, revision: str | None, files: list[str] | None
    ) -> None:
        # Downloaded and copied where that is not done yet.
        datasets.disable_progress_bars()
        if files is not None:
            table = datasets.load_dataset("parquet", data_files=files, split="train")
        else:
            table = datasets.load_dataset(path, split=split, revision=revision)

        # Images stay bytes here: decoded one at a time, a broken one can be named.
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        self.table = table
        self.columns = list(table.column_names)
        self.fingerprint = str(table._fingerprint)

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> list[Any]:
        """A column of all rows, in memory."""
        return list(self.table[name])

    def row(self, index: int) -> dict[str, Any]:
        """One row; its images are encoded bytes."""
        return self.table[index]
