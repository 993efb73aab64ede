"""Parquet read where it lies, on this disk or on the hub: the small columns at once, the pictures a row group at a time.

Nothing is downloaded as a whole and nothing copied, so that a data set of hundreds of gigabytes costs no disk. Every row keeps its number:
order, resume and caches are those of a table on disk.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

SMALL = (
    "caption",
    "label_0",
    "has_label",
)  # read for all rows; the other columns of a row when it is asked for
THREADS = 16  # shards whose footers are read at once
GROUPS = 2  # row groups that are held in memory: 100 or 1000 rows each, as a rule


@dataclass(frozen=True)
class _Shard:
    address: str
    version: str
    size: int  # bytes
    groups: tuple[int, ...]  # rows of each row group
    names: tuple[str, ...]
    small: Any  # pyarrow.Table


def _open(address: str) -> Any:
    import fsspec

    system, path = fsspec.core.url_to_fs(address)
    return system, path


def _read_shard(address: str) -> _Shard:
    import pyarrow.parquet as pq

    system, path = _open(address)
    about = system.info(path)
    version = str(about.get("blob_id") or about.get("mtime") or about.get("created"))
    with system.open(path) as file:
        parquet = pq.ParquetFile(file)
        names = tuple(parquet.schema_arrow.names)
        groups = tuple(
            parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)
        )
        return _Shard(
            address,
            version,
            about["size"],
            groups,
            names,
            parquet.read([n for n in SMALL if n in names], use_threads=False),
        )


class ParquetStream:
    """A `Table` of parquet files by path or fsspec address (hf://datasets/org/name@commit/...). size: their bytes.

    Raises ValueError where a shard has other columns than the first.
    """

    def __init__(self, addresses: list[str]) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            self.shards = list(pool.map(_read_shard, addresses))
        self.columns = list(self.shards[0].names)
        other = next((s for s in self.shards if set(s.names) != set(self.columns)), None)
        if other is not None:
            raise ValueError(
                f"{other.address} has the columns {', '.join(other.names)}, the first shard {', '.join(self.columns)}"
            )
        self.size = sum(s.size for s in self.shards)
        self.fingerprint = hashlib.sha256(
            "".join(f"{s.address} {s.version} {s.size}\n" for s in self.shards).encode()
        ).hexdigest()[:16]
        counts = [
            (number, rows) for number, shard in enumerate(self.shards) for rows in shard.groups
        ]
        self.starts = np.cumsum(
            [0, *(rows for _, rows in counts)]
        )  # the first row of each row group
        shard_of, group_of = np.array([number for number, _ in counts]), np.arange(len(counts))
        sizes = np.diff(self.starts)
        self.blocks = np.stack([np.repeat(shard_of, sizes), np.repeat(group_of, sizes)])
        self.held: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def column(self, name: str) -> list[Any]:
        return [value for shard in self.shards for value in shard.small[name].to_pylist()]

    def row(self, index: int) -> dict[str, Any]:
        group = int(self.blocks[1][index])
        return self._group(group)[index - int(self.starts[group])]

    def _group(self, group: int) -> list[dict[str, Any]]:
        if group not in self.held:
            self.held[group] = self._read_group(group)
            while len(self.held) > GROUPS:
                self.held.popitem(last=False)
        self.held.move_to_end(group)
        return self.held[group]

    def _read_group(self, group: int) -> list[dict[str, Any]]:
        import pyarrow.parquet as pq

        number = int(self.blocks[0][self.starts[group]])
        shard = self.shards[number]
        within = group - sum(len(s.groups) for s in self.shards[:number])
        names = [n for n in shard.names if n in PICTURES or n in SMALL]
        system, path = _open(shard.address)
        with system.open(path) as file:
            return pq.ParquetFile(file).read_row_group(within, names, use_threads=False).to_pylist()


PICTURES = ("jpg_0", "jpg_1", "winner", "loser", "image")
