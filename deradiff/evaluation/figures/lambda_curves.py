"""What lam does to the scores: over lam, and over the path KL."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from deradiff.evaluation.figures.style import INK, dash, looks, panels
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import ANCHOR, Cell, short


def lines_of(means: pd.DataFrame) -> dict[tuple[Any, ...], dict[str, Any]]:
    """How each line is drawn: a colour and a marker an anchor, a dash a mode; and its name, in words that tell it from the others."""
    lines = {}
    models = means.drop_duplicates(["anchor", "mode", *SAMPLING_COLUMNS]).sort_values(
        ["beta", "anchor", "mode"]
    )
    look = looks(models)
    betas = models.drop_duplicates("anchor")["beta"]
    told = [c for c in ("mode", *SAMPLING_COLUMNS) if models[c].nunique() > 1]
    for row in models.to_dict("records"):
        name = (
            f"anchor beta={row['beta']:g}"
            if not pd.isna(row["beta"]) and betas.is_unique
            else short(row["anchor"])
        )
        lines[row["anchor"], row["mode"], *(row[c] for c in SAMPLING_COLUMNS)] = {
            **look[row["anchor"]],
            "linestyle": dash(row["mode"]),
            "label": ", ".join([name, *(str(row[c]) for c in told)]),
        }
    return lines


def score_against_lambda(means: pd.DataFrame, cells: list[Cell]) -> str:
    """Mean score over lam, a line an anchor, with the band of the paired difference to the reference; hollow: aligned from scratch."""
    lines = lines_of(means)
    scratch = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            markerfacecolor="none",
            color=INK,
            label="aligned from scratch at beta / lam",
        )
    ]
    handles = [Line2D([], [], **style) for style in lines.values()] + (scratch if cells else [])

    def draw(panel: Axes, scorer: str) -> None:
        own = means[means["scorer"] == scorer]
        mean = {
            (*(r[c] for c in SAMPLING_COLUMNS), r["anchor"], r["mode"], r["lam"]): r["mean"]
            for r in own.to_dict("records")
        }
        for key, style in lines.items():
            rows = _of(own, key)
            panel.plot(rows["lam"], rows["mean"], **style)
            reference = (
                rows["mean"] - rows["gain"]
            )  # the band is the gain's: prompts differ in height, not in what alignment adds
            panel.fill_between(
                rows["lam"],
                reference + rows["gain_low"],
                reference + rows["gain_high"],
                color=style["color"],
                alpha=0.18,
                lw=0,
            )
        for cell in cells:
            style = lines[cell.realigned[ANCHOR], cell.mode, *cell.bench]
            hollow: dict[str, Any] = {
                "markerfacecolor": "none",
                "markersize": 10,
                "markeredgewidth": 1.6,
                "linestyle": "",
            }
            if cell.target in mean:
                panel.plot(
                    [cell.lam],
                    [mean[cell.target]],
                    color=style["color"],
                    marker=style["marker"],
                    **hollow,
                )
        if own["lam"].max() > 2:  # linear up to the anchor, logarithmic past it
            panel.set_xscale("symlog", linthresh=1, linscale=1.5)
            ticks = [lam for lam in (0, 0.25, 0.5, 1, 2, 4, 10, 20) if lam <= own["lam"].max()]
            panel.set_xticks(ticks, [f"{lam:g}" for lam in ticks])
            panel.minorticks_off()

    return panels(list(means["scorer"].unique()), draw, "lam", _scale(means), handles)


def reward_against_kl(means: pd.DataFrame) -> str | None:
    """Mean score over the square root of the path KL, one line's points named by lam; None where no path KL is known."""
    means = means[means["path_kl"].notna()]
    if means.empty or not (means["path_kl"] > 0).any():
        return None
    lines = lines_of(means)

    farthest = means["path_kl"].max() ** 0.5
    named = max(
        lines, key=lambda key: _of(means, key)["lam"].nunique()
    )  # names at every line would cover one another

    def draw(panel: Axes, scorer: str) -> None:
        own = means[means["scorer"] == scorer]
        for key, style in lines.items():
            rows = _of(own, key)
            panel.plot(rows["path_kl"], rows["mean"], **style)
            last = -np.inf
            for row in rows.to_dict("records") if key == named else []:
                if (place := row["path_kl"] ** 0.5) - last < 0.06 * farthest:
                    continue
                last = place
                panel.annotate(
                    f"{row['lam']:g}",
                    (row["path_kl"], row["mean"]),
                    textcoords="offset points",
                    xytext=(6, -11),
                    fontsize=9,
                )
        panel.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        panel.set_xlim(left=0)

    handles = [Line2D([], [], **style) for style in lines.values()]
    return panels(
        list(means["scorer"].unique()),
        draw,
        "path KL to the reference (nats)",
        _scale(means),
        handles,
    )


def _scale(means: pd.DataFrame) -> dict[str, str]:
    return {
        scorer: f"mean score ({scale})" for scorer, scale in zip(means["scorer"], means["scale"])
    }


def _of(own: pd.DataFrame, key: tuple[Any, ...]) -> pd.DataFrame:
    same = np.logical_and.reduce(
        [own[c] == value for c, value in zip(["anchor", "mode", *SAMPLING_COLUMNS], key)]
    )
    return own[same].sort_values("lam")
