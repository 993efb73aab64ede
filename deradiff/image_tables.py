"""Tables of images: parquet files whose cells hold encoded images."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from deradiff.digests import write_with_digest
from deradiff.image_files import UnreadableImage, decode_image, read_image

DATA_ADDRESS = re.compile(r"data:image/[a-z.+-]{1,20};base64,")
"""What stands before an image in base64 that comes from a web page."""


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    """Write a parquet file and its digest; a reader, or a crash, never finds a part of it.

    Args:
        path: the file.
        columns: by name; an image is its encoded bytes.
    """
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    write_with_digest(path, buffer.getvalue())


def write_pair_table(
    path: Path,
    first: list[bytes],
    second: list[bytes],
    label: list[float],
    captions: list[str],
    **more: list[Any],
) -> None:
    """Write preference pairs in the columns of Pick-a-Pic.

    Args:
        path: the file.
        first: the first image of each pair, encoded.
        second: the second image.
        label: 1 where the first image is preferred, 0 where the second is, 0.5 for a tie.
        captions: one for each pair.
        more: further columns.
    """
    pairs: dict[str, list[Any]] = {
        "jpg_0": first,
        "jpg_1": second,
        "label_0": label,
        "label_1": [1 - value for value in label],
        "caption": captions,
    }
    write_table(path, pairs | more)


def encode_png(image: Image.Image) -> bytes:
    """An image as a PNG, which loses nothing."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def image_of_cell(cell: Any) -> Image.Image:
    """The RGB image of a cell.

    Args:
        cell: an encoded image as bytes, as a list of bytes or as text in base64; the record
            `{"bytes": ..., "path": ...}` that `datasets` makes of an image; or a `Path`, which no
            table holds, of a file that may be read.

    Raises:
        UnreadableImage: for anything else. A path that stands in a table is never read: it would
            be one of this machine, and the table's author would choose it.
    """
    if isinstance(cell, Path):
        return read_image(cell)
    return decode_image(encoded_image(cell))


def encoded_image(cell: Any) -> bytes:
    """The encoded image of a cell.

    Args:
        cell: as of `image_of_cell`, but no `Path`.

    Raises:
        UnreadableImage: for what holds no bytes.
    """
    if isinstance(cell, dict):
        if cell.get("bytes") is None and cell.get("path") is not None:
            raise UnreadableImage(_refused_path(str(cell["path"])))
        cell = cell.get("bytes")
    if cell is None:
        raise UnreadableImage("the cell is empty")
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, str):
        try:
            return base64.b64decode(DATA_ADDRESS.sub("", cell), validate=True)
        except ValueError:
            raise UnreadableImage(_refused_path(cell)) from None
    if isinstance(cell, list):
        try:
            return bytes(cell)
        except (TypeError, ValueError):
            raise UnreadableImage(
                f"the cell is a list of {len(cell)}: give a table with one image in each cell"
            ) from None
    raise UnreadableImage(f"the cell is a {type(cell).__name__}: give the bytes of an image file")


def _refused_path(path: str) -> str:
    return (
        f"the cell names {path[:100]!r} and holds no image, and no file that a table names is "
        "read: write the bytes of the images into the table, or give their folder"
    )
