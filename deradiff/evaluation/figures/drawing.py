"""A finished figure as files: SVG for pages, PDF for papers, PNG for slides and trackers."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import escape
from matplotlib.figure import Figure

from deradiff.evaluation.figures.style import COLOURS, DARK_COLOURS, INK, INK_STYLE, STYLE

FORMATS = ("svg", "pdf", "png")

PNG_DPI = 200
"""Dots an inch: a column of a paper, or a slide."""

NO_DATE: dict[str, dict[str, None]] = {
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}
"""The same figure is the same bytes, on any day."""


@dataclass(frozen=True)
class Drawing:
    """A finished figure in the formats of its files.

    Attributes:
        svg: with a title and a description, for readers that cannot see it.
        pdf: its text is text; None for a grid of images, which is SVG alone.
        png: on white; None as `pdf`.
    """

    svg: str
    pdf: bytes | None = None
    png: bytes | None = None

    @property
    def files(self) -> dict[str, str | bytes]:
        """The contents of its files, by their endings."""
        contents = {ending: getattr(self, ending) for ending in FORMATS}
        return {ending: content for ending, content in contents.items() if content is not None}


def drawing_of(figure: Figure | str, title: str, description: str) -> Drawing:
    """A figure in all of its formats.

    Args:
        figure: of matplotlib, or SVG text.
        title: what it is called.
        description: what it shows.
    """
    if isinstance(figure, str):
        return Drawing(_described(figure, title, description))
    svg = _described(_svg(figure), title, description)
    return Drawing(svg, _saved(figure, "pdf"), _saved(figure, "png", dpi=PNG_DPI))


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    """A figure in one of matplotlib's formats."""
    buffer = io.BytesIO()
    metadata: Any = NO_DATE[kind]
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, metadata=metadata, bbox_inches="tight", **options)
    return buffer.getvalue()


def _svg(figure: Figure) -> str:
    """A figure as SVG whose text is text, and whose ink and colours follow the page."""
    text = _saved(figure, "svg", transparent=True).decode().replace(INK, "currentColor")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "system-ui, 'DejaVu Sans', sans-serif", text)
    return _after_head(text, INK_STYLE + _dark_style(text))


def _dark_style(svg: str) -> str:
    """The colours that an SVG has on a dark page.

    matplotlib writes a colour into the `style` of each element. A selector finds it there.
    """
    rules = []
    for light, dark in zip(COLOURS, DARK_COLOURS, strict=True):
        for name in ("stroke", "fill"):
            if f"{name}: {light}" in svg:
                rules.append(f'[style*="{name}: {light}"]{{{name}:{dark}!important}}')
    if not rules:
        return ""
    return f"<style>@media(prefers-color-scheme:dark){{{''.join(rules)}}}</style>"


def _described(svg: str, title: str, description: str) -> str:
    """An SVG with the title and the description that a screen reader reads out."""
    svg = svg.replace("<svg ", '<svg role="img" ', 1)
    return _after_head(svg, f"<title>{escape(title)}</title><desc>{escape(description)}</desc>")


def _after_head(svg: str, more: str) -> str:
    """An SVG with more elements before the others."""
    end = svg.index(">") + 1
    return svg[:end] + more + svg[end:]
