"""How figures look: SVG whose text is text, on no background, in ink that follows the page: dark on light, light on dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deradiff.realignment.registry import label_of

# Okabe and Ito's colours, those that stand out from white and from near-black alike; colour is never alone: markers differ too.
COLOURS, MARKERS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"), "osD^vP"
INK = "#123456"  # stands for the page's own colour until the file is written
INK_STYLE = "<style>svg{color:#1c2430}@media(prefers-color-scheme:dark){svg{color:#dde3ea}}</style>"  # for an SVG that stands alone
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "deradiff",
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


def svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        metadata={"Date": None, "Creator": None},
        transparent=True,
        bbox_inches="tight",
    )
    text = buffer.getvalue().replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "system-ui, 'DejaVu Sans', sans-serif", text)
    return re.sub(
        r"(<svg [^>]*>)", lambda m: m.group(1) + INK_STYLE, text[text.index("<svg") :], count=1
    )


def panels(
    scorers: Sequence[str],
    draw: Callable[[Axes, str], None],
    xlabel: str | dict[str, str],
    ylabel: str | dict[str, str],
    handles: list[Line2D],
) -> str:
    """One panel a scorer, each drawn by `draw(panel, scorer)`, with one legend above; a label may be one a scorer."""
    columns = min(len(scorers), 3)
    rows = -(-len(scorers) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(11, 2.9 * rows + 0.6) if columns > 1 else (6.5, 4), layout="constrained"
        )
        places = np.ravel(figure.subplots(rows, columns, squeeze=False))
        for place in places[len(scorers) :]:
            place.remove()
        for scorer, panel in zip(scorers, places):
            draw(panel, scorer)
            panel.set_title(scorer)
            panel.set_xlabel(xlabel if isinstance(xlabel, str) else xlabel[scorer])
            panel.set_ylabel(ylabel if isinstance(ylabel, str) else ylabel[scorer])
        if handles:
            figure.legend(handles=handles, loc="outside upper left", ncols=3 if columns > 1 else 1)
        return svg(figure)


def look(index: int, colour: int | None = None) -> dict[str, Any]:
    """Marker and colour of the index-th of several; colour: the index of its colour, where some share one."""
    return {
        "color": COLOURS[(index if colour is None else colour) % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def looks(models: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Of each anchor in `models`: a colour a beta, and a marker of its own among those of one beta. Columns: anchor, beta."""
    anchors = models.drop_duplicates("anchor").sort_values(["beta", "anchor"])
    betas = [
        anchor if pd.isna(beta) else beta
        for anchor, beta in zip(anchors["anchor"], anchors["beta"])
    ]
    colours = list(dict.fromkeys(betas))
    return {
        anchor: look(index, colours.index(beta))
        for index, (anchor, beta) in enumerate(zip(anchors["anchor"], betas))
    }


def dash(mode: str) -> str:
    """The line style of a mode, whose name its setting may follow: `reuse 4`."""
    return label_of(mode).line_style
