"""grid.png: prompts down, lambdas across, so that a person sees at a glance what lambda does."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROWS = 12  # a taller grid is no longer looked at
TILE = 192  # longer side of an image in the grid, pixels
LABEL = 190  # width of the column of prompts
HEAD = 34
GAP = 6


def draw_grid(rows: list[tuple[str, list[Path]]], lambdas: list[float], file: Path) -> None:
    """rows: a prompt and its images, one for each lambda. Small images are enlarged to the tile, large ones reduced."""
    width, height = _fit(Image.open(rows[0][1][0]).size)
    sheet = Image.new(
        "RGB", (LABEL + len(lambdas) * (width + GAP), HEAD + len(rows) * (height + GAP)), "white"
    )
    draw, font, small = ImageDraw.Draw(sheet), _font(15), _font(13)
    for column, lam in enumerate(lambdas):
        role = {0.0: "  reference", 1.0: "  anchor"}.get(lam, "")
        centre = LABEL + column * (width + GAP) + width / 2
        draw.text((centre, HEAD / 2), f"λ = {lam:g}{role}", fill="black", font=font, anchor="mm")
    for row, (prompt, images) in enumerate(rows):
        top = HEAD + row * (height + GAP)
        draw.multiline_text(
            (GAP, top + height / 2),
            _wrapped(prompt, height),
            fill="black",
            font=small,
            anchor="lm",
            spacing=4,
        )
        for column, image in enumerate(images):
            tile = (
                Image.open(image).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            )
            left = LABEL + column * (width + GAP)
            sheet.paste(tile, (left, top))
            draw.rectangle(
                (left, top, left + width - 1, top + height - 1), outline="#cccccc"
            )  # a white picture ends somewhere, too
    sheet.save(file)


def _fit(size: tuple[int, int]) -> tuple[int, int]:
    scale = TILE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _wrapped(prompt: str, height: int) -> str:
    lines = textwrap.wrap(
        " ".join(prompt[:1000].split()), width=24, max_lines=max(1, height // 19), placeholder=" …"
    )
    return "\n".join(lines)


def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import (
        font_manager,
    )  # DejaVu comes with it and has Greek, Cyrillic and more, which Pillow's own font lacks

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
