"""A sheet of images: rows of equal tiles, with labels beside and above them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

LABEL_WIDTH = 190
"""Pixels of the column of labels."""

HEAD_HEIGHT = 34
"""Pixels of the row of column heads."""

GAP = 6
"""Pixels between tiles."""

LINE_HEIGHT = 19
LABEL_COLUMNS = 24
LONGEST_LABEL = 1000


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], heads: Sequence[str], tile: int
) -> Image.Image:
    """Images in rows, each with a label at its left, under a row of heads.

    Args:
        rows: a label and its images, one for each head. Images of a sheet have one size.
        heads: what stands above the columns.
        tile: longer side of an image on the sheet, in pixels. Smaller images are enlarged.
    """
    # An empty sheet. All images have the size of the first.
    width, height = _fitted(rows[0][1][0].size, tile)
    size = (LABEL_WIDTH + len(heads) * (width + GAP), HEAD_HEIGHT + len(rows) * (height + GAP))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)

    # Heads, each in the middle of its column.
    head_font = _font(15)
    for column, head in enumerate(heads):
        centre = LABEL_WIDTH + column * (width + GAP) + width / 2
        draw.text((centre, HEAD_HEIGHT / 2), head, fill="black", font=head_font, anchor="mm")

    # Rows: the label, then the images.
    label_font = _font(13)
    for row, (label, images) in enumerate(rows):
        top = HEAD_HEIGHT + row * (height + GAP)
        draw.multiline_text(
            (GAP, top + height / 2),
            _wrapped(label, height),
            fill="black",
            font=label_font,
            anchor="lm",
            spacing=4,
        )
        for column, image in enumerate(images):
            left = LABEL_WIDTH + column * (width + GAP)
            resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(resized, (left, top))
            # A frame shows where a white image ends.
            box = (left, top, left + width - 1, top + height - 1)
            draw.rectangle(box, outline="#cccccc")
    return sheet


def _fitted(size: tuple[int, int], longest: int) -> tuple[int, int]:
    scale = longest / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _wrapped(label: str, height: int) -> str:
    lines = textwrap.wrap(
        " ".join(label[:LONGEST_LABEL].split()),
        width=LABEL_COLUMNS,
        max_lines=max(1, height // LINE_HEIGHT),
        placeholder=" …",
    )
    return "\n".join(lines)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib ships: it has Greek and Cyrillic, which Pillow's own font lacks."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
