"""Parquet read where it is, on this disk or on the hub.

The small columns are read at once, the images a row group at a time. Nothing is downloaded as a
whole and nothing is copied, so a data set of hundreds of gigabytes takes no disk. Rows have the
same numbers as in a table on disk: order, resuming and caches are the same.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deradiff.text_files import LFS_POINTER

SMALL_COLUMNS = ("caption", "label_0", "has_label")
"""Read for all rows when the stream is opened."""

LARGE_COLUMNS = ("jpg_0", "jpg_1", "winner", "loser", "image")
"""Read with the small ones when a row is asked for; other columns are never read."""

THREADS = 16
"""Shards whose footers are read at once."""

GROUPS_IN_MEMORY = 2
"""Row groups; most data sets have 100 or 1000 rows in each."""


@dataclass(frozen=True)
class Shard:
    """One parquet file, as its footer describes it.

    Attributes:
        address: a path, or an fsspec address.
        version: a text that changes when the file changes.
        size: bytes.
        groups: number of rows of each row group.
        columns: names of all columns.
    """

    address: str
    version: str
    size: int
    groups: tuple[int, ...]
    columns: tuple[str, ...]


@contextmanager
def _opened(address: str) -> Iterator[pq.ParquetFile]:
    """A parquet file, opened. Raises ValueError for what is none, or is torn."""
    system, path = fsspec.core.url_to_fs(address)
    try:
        with system.open(path) as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(
                    f"{address} is a Git LFS pointer and not the table: run git lfs pull in its "
                    "folder"
                )
            yield pq.ParquetFile(file)
    # arrow's errors are of the first two classes; a torn text is no UTF-8.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{address} is no parquet file that can be read ({reason}): it is torn or something "
            "else, so fetch or copy it again"
        ) from error


def _read_footer(address: str) -> Shard:
    # What tells this file from a later one at the same address.
    system, path = fsspec.core.url_to_fs(address)
    info = system.info(path)
    version = info.get("blob_id") or info.get("mtime") or info.get("created")

    # The footer names the columns and the row groups.
    with _opened(address) as parquet:
        columns = tuple(parquet.schema_arrow.names)
        metadata = parquet.metadata
        groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    twice = {name for name in columns if columns.count(name) > 1}
    if twice:
        raise ValueError(f"{address} has two columns {min(twice)}: give one of them another name")
    return Shard(address, str(version), info["size"], groups, columns)


def read_small_columns(shard: Shard) -> pa.Table:
    """The small columns of all rows of a file."""
    names = [name for name in SMALL_COLUMNS if name in shard.columns]
    with _opened(shard.address) as parquet:
        return parquet.read(names, use_threads=False)


def read_shards(addresses: list[str]) -> list[Shard]:
    """The files of a table by their footers, without those that have no rows.

    Args:
        addresses: paths, or fsspec addresses.

    Returns:
        The files with rows; where none has any, the first.

    Raises:
        ValueError: for a file that is no parquet, or has other columns than the first.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        shards = list(pool.map(_read_footer, addresses))
    with_rows = [shard for shard in shards if sum(shard.groups)]
    for shard in with_rows:
        if set(shard.columns) != set(with_rows[0].columns):
            raise ValueError(
                f"{shard.address} has the columns {', '.join(shard.columns)}, and "
                f"{with_rows[0].address} has {', '.join(with_rows[0].columns)}: give shards of one "
                "table"
            )
    return with_rows or shards[:1]


class ParquetStream:
    """A `RowSource` of parquet files.

    Args:
        addresses: paths, or fsspec addresses (`hf://datasets/org/name@commit/...`).

    Attributes:
        columns: names of the columns.
        fingerprint: a digest of the files' addresses, versions and sizes.
        blocks: (2, rows): the shard and the row group of each row, both counted over all files.
        shards: the files.
        size: bytes of all files.

    Raises:
        ValueError: for a file that is no parquet, or has other columns than the first.
    """

    def __init__(self, addresses: list[str]) -> None:
        # Footers and small columns of all files.
        self.shards = read_shards(addresses)
        with ThreadPoolExecutor(THREADS) as pool:
            self._small = list(pool.map(read_small_columns, self.shards))
        self.columns = list(self.shards[0].columns)
        self.size = sum(shard.size for shard in self.shards)
        lines = [f"{shard.address} {shard.version} {shard.size}\n" for shard in self.shards]
        self.fingerprint = hashlib.sha256("".join(lines).encode()).hexdigest()[:16]

        # The shard and the row group of each row. Row groups are numbered over all shards.
        shard_of_group: list[int] = []
        sizes: list[int] = []
        for number, shard in enumerate(self.shards):
            shard_of_group += [number] * len(shard.groups)
            sizes += shard.groups
        self._first_rows = np.cumsum([0, *sizes])
        shards_of_rows = np.repeat(np.array(shard_of_group), sizes)
        groups_of_rows = np.repeat(np.arange(len(sizes)), sizes)
        self.blocks = np.stack([shards_of_rows, groups_of_rows])
        self._groups_in_memory: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def column(self, name: str) -> list[Any]:
        """One of `SMALL_COLUMNS`, of all rows."""
        values = []
        for small in self._small:
            values += small[name].to_pylist()
        return values

    def row(self, index: int) -> dict[str, Any]:
        """One row; its images are encoded bytes. Its whole row group is read and kept."""
        group = int(self.blocks[1][index])
        return self._group(group)[index - int(self._first_rows[group])]

    def _group(self, group: int) -> list[dict[str, Any]]:
        """The rows of a group, from memory where they are kept."""
        kept = self._groups_in_memory
        if group not in kept:
            kept[group] = self._read_group(group)
            while len(kept) > GROUPS_IN_MEMORY:
                kept.popitem(last=False)
        kept.move_to_end(group)
        return kept[group]

    def _read_group(self, group: int) -> list[dict[str, Any]]:
        # The shard that the group lies in, and the group's number there.
        number = int(self.blocks[0][self._first_rows[group]])
        shard = self.shards[number]
        groups_before = sum(len(before.groups) for before in self.shards[:number])

        # Its rows, with the columns that training reads.
        wanted = {*LARGE_COLUMNS, *SMALL_COLUMNS}
        columns = [name for name in shard.columns if name in wanted]
        with _opened(shard.address) as parquet:
            table = parquet.read_row_group(group - groups_before, columns, use_threads=False)
            return table.to_pylist()
