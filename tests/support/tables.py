"""Small tables of images, whose grey values tell the row."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from deradiff.image_tables import write_pair_table


def png(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A grey image, encoded."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, format="PNG")
    return buffer.getvalue()


def grey_value(image: Image.Image) -> int:
    """The value of a grey image."""
    return int(np.asarray(image)[0, 0, 0])


def write_four_pairs(path: Path) -> Path:
    """Image 0 wins, image 1 wins, a tie, and image 0 wins.

    Image 0 of row i has the value i, image 1 has 100 + i.
    """
    write_pair_table(
        path,
        first=[png(row) for row in range(4)],
        second=[png(100 + row) for row in range(4)],
        label=[1.0, 0.0, 0.5, 1.0],
        captions=["a", "b", "c", "a"],
    )
    return path


def write_broken_pairs(path: Path, count: int = 8, broken: tuple[int, ...] = (2, 3)) -> str:
    """Pairs whose image 1, the loser, cannot be decoded in some rows.

    The value of the winner and the caption are the number of the row.
    """
    rows = range(count)
    write_pair_table(
        path,
        first=[png(row) for row in rows],
        second=[b"broken" if row in broken else png(100 + row) for row in rows],
        label=[1.0] * count,
        captions=[str(row) for row in rows],
    )
    return str(path)
