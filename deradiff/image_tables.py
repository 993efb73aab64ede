"""Tables of images: parquet files whose cells hold encoded images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from deradiff.files import write_atomic


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    """Write a parquet file; a reader, or a crash, never finds a part of it.

    Args:
        path: the file.
        columns: by name; an image is its encoded bytes.
    """
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


def decode_image(cell: Any) -> Image.Image:
    """The RGB image of a cell.

    Args:
        cell: encoded bytes, or the record that `datasets` makes of an image.

    Raises:
        OSError: for what is not an image.
    """
    # The encoded bytes.
    if isinstance(cell, dict):
        has_bytes = cell.get("bytes") is not None
        cell = cell["bytes"] if has_bytes else Path(cell["path"]).read_bytes()
    if cell is None:
        raise OSError("the cell is empty")

    # The image.
    try:
        return Image.open(io.BytesIO(cell)).convert("RGB")
    # PIL raises these for some torn PNGs, and for an image of too many pixels.
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from error
