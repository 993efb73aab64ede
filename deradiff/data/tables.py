"""The tables that training reads: captioned images, and preference pairs in Pick-a-Pic's columns or as winner and loser."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

PAIR_COLUMNS = ("jpg_0", "jpg_1", "label_0", "caption")
CHOICE_COLUMNS = ("winner", "loser", "caption")
IMAGE_COLUMNS = ("image", "caption")


class Table(Protocol):
    """Rows that are read one at a time. fingerprint: of the content. blocks: (shard, row group) of every row where rows that lie
    together should be read together, as (2, rows); None where any order is as good."""

    columns: list[str]
    fingerprint: str

    @property
    def blocks(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...

    def column(self, name: str) -> list[Any]:
        """One column of small values, in memory."""

    def row(self, index: int) -> dict[str, Any]:
        """One row; images as their encoded bytes."""


def open_table(
    source: str, split: str = "train", revision: str | None = None, streaming: bool = False
) -> Table:
    """A parquet file, a folder of parquet files or of captioned images (with a metadata.jsonl of `file_name` and `caption`), or a hub id.

    streaming: parquet is read where it lies, on this disk or on the hub; otherwise it is downloaded, and mapped into memory through a
    copy in arrow's format. Raises ValueError for a source, split or revision that is not there.
    """
    from deradiff.data.sources import parquet_files

    files = parquet_files(source, split, revision)
    if streaming:
        if files is None:
            raise ValueError(
                f"{source} is not parquet, so it cannot be streamed: give data.streaming=false"
            )
        from deradiff.data.stream import ParquetStream

        return ParquetStream(files)
    return ArrowTable(source, split, revision, files)


class ArrowTable:
    """A `datasets.Dataset`: memory-mapped, read in any order."""

    blocks = None

    def __init__(
        self, source: str, split: str, revision: str | None, files: list[str] | None
    ) -> None:
        import datasets

        datasets.disable_progress_bars()
        if files is not None:
            table = datasets.load_dataset("parquet", data_files=files, split="train")
        else:
            table = datasets.load_dataset(source, split=split, revision=revision)
        for (
            name,
            feature,
        ) in (
            table.features.items()
        ):  # bytes are decoded by us, one image at a time, so that a broken one can be named
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        self.table, self.columns, self.fingerprint = (
            table,
            list(table.column_names),
            str(table._fingerprint),
        )

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> list[Any]:
        return list(self.table[name])

    def row(self, index: int) -> dict[str, Any]:
        return self.table[index]


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    """Write a parquet file whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from deradiff.files import write_atomic

    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    write_atomic(path, buffer.getvalue())


def write_pair_table(
    path: Path,
    first: list[bytes],
    second: list[bytes],
    label: list[float],
    captions: list[str],
    **more: list[Any],
) -> None:
    """Pairs in Pick-a-Pic's columns, and `more`. first, second: encoded images; label: 1 where the first is preferred, 0 the second, .5 a
    tie."""
    pairs: dict[str, list[Any]] = {
        "jpg_0": first,
        "jpg_1": second,
        "label_0": label,
        "label_1": [1 - x for x in label],
        "caption": captions,
    }
    write_table(path, pairs | more)


def decode(value: Any) -> Image.Image:
    """An RGB picture from encoded bytes, or from the record that `datasets` makes of an image. Raises OSError for what is no picture."""
    if isinstance(value, dict):
        value = (
            value["bytes"] if value.get("bytes") is not None else Path(value["path"]).read_bytes()
        )
    if value is None:
        raise OSError("there is nothing in this cell")
    try:
        return Image.open(io.BytesIO(value)).convert("RGB")
    except (
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # what PIL says of some torn PNGs, and of a bomb
        raise OSError(str(error)) from error


def encode_png(image: Image.Image) -> bytes:
    """The picture as a PNG, which loses nothing."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
