"""The figures, as SVG whose text is text, on no background, in ink that follows the page: dark on light, light on dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eval.pairing import ANCHOR, Cell, short
from eval.samples import BENCH

# Okabe and Ito's colours, those that stand out from white and from near-black alike; colour is never alone: markers differ too.
COLOURS, MARKERS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"), "osD^vP"
STYLES = {"exact": "-", "weights": "--"}
INK = "#123456"  # stands for the page's own colour until the file is written
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "deradiff", "font.size": 10, "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "axes.titlecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "grid.color": INK, "grid.alpha": 0.15, "grid.linewidth": 0.8, "axes.grid": True, "axes.axisbelow": True,
    "legend.frameon": False, "lines.linewidth": 1.8, "lines.markersize": 5,
}  # fmt: skip


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True, bbox_inches="tight")
    text = buffer.getvalue().replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "system-ui, 'DejaVu Sans', sans-serif", text)
    ink = "<style>svg{color:#1c2430}@media(prefers-color-scheme:dark){svg{color:#dde3ea}}</style>"
    return re.sub(r"(<svg [^>]*>)", lambda m: m.group(1) + ink, text[text.index("<svg") :], count=1)


def _panels(means: pd.DataFrame, draw: Callable[[Axes, pd.DataFrame], None], xlabel: str, handles: list[Line2D]) -> str:
    """One panel a scorer, drawn on that scorer's rows, with one legend above."""
    scorers = list(means["scorer"].unique())
    columns = min(len(scorers), 3)
    rows = -(-len(scorers) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.9 * rows + 0.6) if columns > 1 else (6.5, 4), layout="constrained")
        panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
        for panel in panels[len(scorers) :]:
            panel.remove()
        for scorer, panel in zip(scorers, panels):
            own = means[means["scorer"] == scorer]
            draw(panel, own)
            panel.set_title(scorer)
            panel.set_xlabel(xlabel)
            panel.set_ylabel(f"mean score ({own['scale'].iloc[0]})")
        figure.legend(handles=handles, loc="outside upper left", ncols=3 if columns > 1 else 1)
        return _svg(figure)


def _lines(means: pd.DataFrame) -> dict[tuple[Any, ...], dict[str, Any]]:
    """How each line is drawn: a colour and a marker an anchor, a dash a mode; and its name, in words that tell it from the others."""
    lines = {}
    models = means.drop_duplicates(["anchor", "mode", *BENCH]).sort_values(["beta", "anchor", "mode"])
    anchors = list(dict.fromkeys(models["anchor"]))
    betas = models.drop_duplicates("anchor")["beta"]
    told = [c for c in ("mode", *BENCH) if models[c].nunique() > 1]
    for row in models.to_dict("records"):
        index = anchors.index(row["anchor"])
        name = f"anchor beta={row['beta']:g}" if not pd.isna(row["beta"]) and betas.is_unique else short(row["anchor"])
        lines[row["anchor"], row["mode"], *(row[c] for c in BENCH)] = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": STYLES.get(row["mode"], ":"),
            "label": ", ".join([name, *(str(row[c]) for c in told)]),
        }
    return lines


def score_against_lambda(means: pd.DataFrame, cells: list[Cell]) -> str:
    """Mean score over lam, a line an anchor, with the band of the paired difference to the reference; hollow: aligned from scratch."""
    lines = _lines(means)
    scratch = [Line2D([], [], linestyle="", marker="o", markerfacecolor="none", color=INK, label="aligned from scratch at beta / lam")]
    handles = [Line2D([], [], **style) for style in lines.values()] + (scratch if cells else [])

    def draw(panel: Axes, own: pd.DataFrame) -> None:
        mean = {(*(r[c] for c in BENCH), r["anchor"], r["mode"], r["lam"]): r["mean"] for r in own.to_dict("records")}
        for key, style in lines.items():
            rows = _of(own, key)
            panel.plot(rows["lam"], rows["mean"], **style)
            reference = rows["mean"] - rows["gain"]  # the band is the gain's: prompts differ in height, not in what alignment adds
            panel.fill_between(
                rows["lam"], reference + rows["gain_low"], reference + rows["gain_high"], color=style["color"], alpha=0.18, lw=0
            )
        for cell in cells:
            style = lines[cell.realigned[ANCHOR], cell.mode, *cell.bench]
            hollow: dict[str, Any] = {"markerfacecolor": "none", "markersize": 10, "markeredgewidth": 1.6, "linestyle": ""}
            if cell.target in mean:
                panel.plot([cell.lam], [mean[cell.target]], color=style["color"], marker=style["marker"], **hollow)
        if own["lam"].max() > 2:  # linear up to the anchor, logarithmic past it
            panel.set_xscale("symlog", linthresh=1, linscale=1.5)
            ticks = [lam for lam in (0, 0.25, 0.5, 1, 2, 4, 10, 20) if lam <= own["lam"].max()]
            panel.set_xticks(ticks, [f"{lam:g}" for lam in ticks])
            panel.minorticks_off()

    return _panels(means, draw, "lam", handles)


def reward_against_kl(means: pd.DataFrame) -> str | None:
    """Mean score over the square root of the path KL, one line's points named by lam; None where no path KL is known."""
    means = means[means["path_kl"].notna()]
    if means.empty or not (means["path_kl"] > 0).any():
        return None
    lines = _lines(means)

    farthest = means["path_kl"].max() ** 0.5
    named = max(lines, key=lambda key: _of(means, key)["lam"].nunique())  # names at every line would cover one another

    def draw(panel: Axes, own: pd.DataFrame) -> None:
        for key, style in lines.items():
            rows = _of(own, key)
            panel.plot(rows["path_kl"], rows["mean"], **style)
            last = -np.inf
            for row in rows.to_dict("records") if key == named else []:
                if (place := row["path_kl"] ** 0.5) - last < 0.06 * farthest:
                    continue
                last = place
                panel.annotate(f"{row['lam']:g}", (row["path_kl"], row["mean"]), textcoords="offset points", xytext=(6, -11), fontsize=9)
        panel.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        panel.set_xlim(left=0)

    return _panels(means, draw, "path KL to the reference (nats)", [Line2D([], [], **style) for style in lines.values()])


def _of(own: pd.DataFrame, key: tuple[Any, ...]) -> pd.DataFrame:
    same = np.logical_and.reduce([own[c] == value for c, value in zip(["anchor", "mode", *BENCH], key)])
    return own[same].sort_values("lam")
