"""How figures look, on a light page, on a dark one and on paper.

As SVG a figure has no background, its text is text, and its ink and colours follow the page. As PDF
and PNG it has those of a light page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deradiff.realignment.registry import LineStyle, label_of

COLOURS = ("#033f84", "#f3691d", "#097b4a", "#60043e", "#1f79ff", "#a71300")
"""Of lines on a light page. Each has a contrast of at least 3 to it, and a lightness of its own:
they differ in a grey print and for the colour-blind."""

DARK_COLOURS = ("#2bb2ed", "#ec6138", "#b9ffb6", "#ffa2c3", "#3a6ccc", "#dfda4c")
"""The same on a dark page."""

MARKERS = "osD^vP"
"""Colour is never alone: markers differ, too."""

INK = "#1c2430"
"""Of text and axes on a light page. In an SVG it is the colour of the text around it."""

DARK_INK = "#dde3ea"
"""The same on a dark page."""

INK_STYLE = (
    f"<style>svg{{color:{INK}}}@media(prefers-color-scheme:dark){{svg{{color:{DARK_INK}}}}}</style>"
)
"""The ink of an SVG that stands alone."""

HOLLOW: dict[str, Any] = {
    "markerfacecolor": "none",
    "markersize": 10,
    "markeredgewidth": 1.6,
    "linestyle": "",
}
"""How the points of models that were aligned from scratch are drawn."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "deradiff",
    "pdf.fonttype": 42,
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


def panels(
    scorers: Sequence[str],
    draw: Callable[[Axes, str], None],
    xlabel: str,
    ylabel: str | Mapping[str, str],
    handles: Sequence[Line2D],
) -> Figure:
    """A figure of one panel a scorer, with one legend above.

    Args:
        scorers: their labels.
        draw: draws a scorer's panel.
        xlabel: of every panel.
        ylabel: of every panel, or one for each scorer.
        handles: of the legend; none: no legend.
    """
    columns = 2 if len(scorers) == 4 else min(len(scorers), 3)
    rows = -(-len(scorers) // columns)
    size = (11, 2.9 * rows + 0.6) if columns > 1 else (6.5, 4)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        places = np.ravel(figure.subplots(rows, columns, squeeze=False))
        for unused in places[len(scorers) :]:
            unused.remove()
        for scorer, panel in zip(scorers, places):
            draw(panel, scorer)
            panel.set_title(scorer)
            panel.set_xlabel(xlabel)
            panel.set_ylabel(ylabel if isinstance(ylabel, str) else ylabel[scorer])
        if handles:
            ncols = 3 if columns > 1 else 1
            figure.legend(handles=list(handles), loc="outside upper left", ncols=ncols)
        return figure


def line_style(index: int, colour: int | None = None) -> dict[str, Any]:
    """Marker and colour of the index-th of several lines.

    Args:
        index: of the line.
        colour: of its colour, where several lines share one.
    """
    colour = index if colour is None else colour
    return {"color": COLOURS[colour % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def anchor_styles(models: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The style of each anchor: a marker of its own, and a colour a beta where betas differ.

    Args:
        models: with the columns anchor and beta.
    """
    anchors = models.drop_duplicates("anchor").sort_values(["beta", "anchor"])
    groups = []
    for anchor, beta in zip(anchors["anchor"], anchors["beta"]):
        groups.append(anchor if pd.isna(beta) else beta)
    if len(set(groups)) == 1:
        groups = list(anchors["anchor"])
    colours = list(dict.fromkeys(groups))
    styles = {}
    for index, (anchor, group) in enumerate(zip(anchors["anchor"], groups)):
        styles[anchor] = line_style(index, colours.index(group))
    return styles


def dash(label: str) -> LineStyle:
    """The dash of a mode, by its label."""
    return label_of(label).line_style
