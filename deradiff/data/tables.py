"""The tables that training reads: captioned images, and preference pairs in two forms."""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError

from deradiff.data.sources import parquet_files
from deradiff.data.stream import (
    LARGE_COLUMNS,
    SMALL_COLUMNS,
    ParquetStream,
    Shard,
    read_shards,
    read_small_columns,
)

log = logging.getLogger(__name__)

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
        """One row; its images are as `deradiff.image_tables.image_of_cell` takes them."""


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

    Raises:
        ValueError: for what is no such table.
    """

    blocks = None

    def __init__(
        self, path: str, split: str, revision: str | None, files: list[str] | None
    ) -> None:
        # Downloaded and copied where that is not done yet.
        datasets.disable_progress_bars()
        try:
            table = _load(path, split, revision, files)
        except (DatasetGenerationError, FileNotFoundError, ValueError) as error:
            cause = error.__cause__ or error
            reason = " ".join(str(cause).split())[:300]
            raise ValueError(f"path={path} is no table that can be read: {reason}") from error

        # Cells stay as they are: decoded here one at a time, a broken one can be named.
        self.table = table
        self.columns = list(table.column_names)
        self.fingerprint = str(table._fingerprint)
        names = [name for name in self.columns if name in {*SMALL_COLUMNS, *LARGE_COLUMNS}]
        self._rows = table.select_columns(names).with_format("arrow")

        # A folder's images are its files. Elsewhere a path is not read; see `image_of_cell`.
        self._folders: tuple[Path, ...] = ()
        if files is None and Path(path).is_dir():
            self._folders = (Path(path).resolve(),)
        elif files is None:
            config = datasets.config
            caches = (config.DOWNLOADED_DATASETS_PATH, config.HF_HUB_CACHE)
            self._folders = tuple(Path(cache).resolve() for cache in caches)

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> list[Any]:
        """A column of all rows, in memory."""
        return self.table.data.column(name).to_pylist()

    def row(self, index: int) -> dict[str, Any]:
        """One row; its images are encoded bytes, or files of the folder that was opened."""
        (row,) = self._rows[index : index + 1].to_pylist()
        return {name: self._file_or(cell) for name, cell in row.items()}

    def _file_or(self, cell: Any) -> Any:
        """The file that a cell of a folder of images stands for; any other cell as it is."""
        if not isinstance(cell, dict) or cell.get("bytes") is not None or not cell.get("path"):
            return cell
        file = Path(cell["path"])
        is_inside = any(file.resolve().is_relative_to(folder) for folder in self._folders)
        return file if is_inside else cell


def _load(path: str, split: str, revision: str | None, files: list[str] | None) -> datasets.Dataset:
    """The table of a data set, by `datasets`. Names of files are no patterns, though it takes them
    for such."""
    if files is None and Path(path).is_dir():
        folder = glob.escape(path)
        return datasets.load_dataset("imagefolder", data_dir=folder, split=split)
    if files is None:
        return datasets.load_dataset(path, split=split, revision=revision)
    if not Path(files[0]).is_file():
        return datasets.load_dataset("parquet", data_files=files, split="train")

    # The copy in arrow's format is told apart by size and time, which a changed file may keep.
    shards = read_shards(files)
    if not sum(shards[0].groups):
        raise ValueError("it has no rows")
    files = [glob.escape(shard.address) for shard in shards]
    table = datasets.load_dataset("parquet", data_files=files, split="train")
    if not _has_small_columns_of(table, shards):
        log.warning("%s has changed since it was copied, and is copied again", path)
        mode = datasets.DownloadMode.FORCE_REDOWNLOAD
        table = datasets.load_dataset(
            "parquet", data_files=files, split="train", download_mode=mode
        )
    return table


def _has_small_columns_of(table: datasets.Dataset, shards: Sequence[Shard]) -> bool:
    """Whether a copy has the captions and labels of the files that it was made from."""
    small = pa.concat_tables([read_small_columns(shard) for shard in shards])
    for name in small.column_names:
        copied = table.data.column(name)
        if not _comparable(copied).equals(_comparable(small.column(name).cast(copied.type))):
            return False
    return True


def _comparable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column in which every NaN, which equals nothing, is null."""
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_nan(column), None, column)
