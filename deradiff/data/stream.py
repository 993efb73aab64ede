"""Parquet read where it is, on this disk or on the hub.

The small columns are read at once, the images a row group at a time. Nothing is downloaded as a
whole and nothing is copied, so a data set of hundreds of gigabytes takes no disk. Rows have the
same numbers as in a table on disk: order, resuming and caches are the same.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
    """One parquet file.

    Attributes:
        address: a path, or an fsspec address.
        version: a text that changes when the file changes.
        size: bytes.
        groups: number of rows of each row group.
        columns: names of all columns.
        small: the small columns of all rows.
    """

    address: str
    version: str
    size: int
    groups: tuple[int, ...]
    columns: tuple[str, ...]
    small: pa.Table


def _read_shard(address: str) -> Shard:
    """Read a file's footer and its small columns."""
    # What tells this file from a later one at the same address.
    system, path = fsspec.core.url_to_fs(address)
    info = system.info(path)
    version = info.get("blob_id") or info.get("mtime") or info.get("created")

    # The footer names the columns and the row groups; the small columns are read whole.
    with system.open(path) as file:
        parquet = pq.ParquetFile(file)
        columns = tuple(parquet.schema_arrow.names)
        metadata = parquet.metadata
        groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        small_columns = [name for name in SMALL_COLUMNS if name in columns]
        small = parquet.read(small_columns, use_threads=False)
    return Shard(address, str(version), info["size"], groups, columns, small)


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
        ValueError: where a file has other columns than the first.
    """

    def __init__(self, addresses: list[str]) -> None:
        # Footers and small columns of all files.
        with ThreadPoolExecutor(THREADS) as pool:
            self.shards = list(pool.map(_read_shard, addresses))
        self._check_columns()
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

    def _check_columns(self) -> None:
        first = self.shards[0]
        for shard in self.shards:
            if set(shard.columns) != set(first.columns):
                raise ValueError(
                    f"{shard.address} has the columns {', '.join(shard.columns)}, the first "
                    f"shard {', '.join(first.columns)}"
                )

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def column(self, name: str) -> list[Any]:
        """One of `SMALL_COLUMNS`, of all rows."""
        values = []
        for shard in self.shards:
            values += shard.small[name].to_pylist()
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
        system, path = fsspec.core.url_to_fs(shard.address)
        with system.open(path) as file:
            parquet = pq.ParquetFile(file)
            table = parquet.read_row_group(group - groups_before, columns, use_threads=False)
        return table.to_pylist()
