"""Figures of how close realigned models come: ECDF of the errors, scatter around the identity, Bland-Altman."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from deradiff.evaluation.agreement import error_ecdf, limits_of_agreement
from deradiff.evaluation.figures.style import COLOURS, INK, dash, looks, panels
from deradiff.evaluation.pairing import Cell, Group, short
from deradiff.evaluation.tables.errors import aligned, first_range

HOLLOW: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 1.4}
RIVALS = {
    "realigned": INK,
    "anchor as is": COLOURS[5],
    "reference as is": COLOURS[0],
    "seed floor": COLOURS[2],
}


def ecdf(
    errors: pd.DataFrame, cells: list[Cell], groups: dict[Group, pd.DataFrame], threshold: float
) -> str:
    """Share of cells within (0, 1) whose error is at most x % of the target's mean: of the realigned models, and of those that nothing was
    done to; of cells above 1 where there are no others."""
    name, within = first_range(errors)
    errors = errors[errors["lam"].map(within)]
    shown = {
        (what, mode): _step(what, mode)
        for what in RIVALS
        for mode in errors["mode"].unique()
        if what == "realigned" or _first(errors, mode)
    }
    shown = {key: style for key, style in shown.items() if len(_of(errors, *key))}

    def draw(panel: Axes, scorer: str) -> None:
        own = errors[errors["scorer"] == scorer]
        for (what, mode), style in shown.items():
            chosen = _of(own, what, mode)
            if not len(chosen):
                continue
            model, target, _ = aligned(chosen, cells, groups)
            scale = 100 / chosen["target_mean"].abs().to_numpy()
            found = error_ecdf(model * scale, target * scale)
            panel.step(found.x, 100 * found.share, where="post", **style)
            if what == "realigned":
                panel.fill_between(
                    found.x,
                    100 * found.low,
                    100 * found.high,
                    step="post",
                    color=style["color"],
                    alpha=0.15,
                    lw=0,
                )
        panel.axvline(threshold, color=INK, lw=0.8, linestyle=":")
        panel.set_xscale("symlog", linthresh=threshold / 4)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlim(left=0)
        panel.set_ylim(0, 102)

    handles = [Line2D([], [], **style) for style in shown.values()]
    handles.append(
        Line2D([], [], color=INK, lw=0.8, linestyle=":", label=f"{threshold:g} % of the mean")
    )
    return panels(
        list(errors["scorer"].unique()),
        draw,
        "error, % of the target's mean",
        f"% of the cells, {name}",
        handles,
    )


def _first(errors: pd.DataFrame, mode: str) -> bool:
    return bool(
        mode == errors["mode"].iloc[0]
    )  # a rival to which nothing was done is the same in every mode


def _of(errors: pd.DataFrame, what: str, mode: str) -> pd.DataFrame:
    return errors[(errors["what"] == what) & (errors["mode"] == mode)]


def _step(what: str, mode: str) -> dict[str, Any]:
    label = f"realigned, {mode}" if what == "realigned" else what
    return {
        "color": RIVALS[what],
        "linestyle": dash(mode) if what == "realigned" else "-",
        "lw": 2.2 if what == "realigned" else 1.3,
        "label": label,
    }


def scatter(errors: pd.DataFrame) -> str:
    """The realigned model's mean score over the target's, a point a cell, and the identity; hollow: lam above 1."""
    own = errors[errors["what"] == "realigned"]

    def draw(panel: Axes, scorer: str) -> None:
        rows = own[own["scorer"] == scorer]
        both = [
            min(rows["mean"].min(), rows["target_mean"].min()),
            max(rows["mean"].max(), rows["target_mean"].max()),
        ]
        panel.plot(both, both, color=INK, lw=0.8)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        _points(panel, rows, rows["target_mean"], rows["mean"], looks(own))

    return panels(
        list(own["scorer"].unique()),
        draw,
        "mean score, from scratch",
        "mean score, realigned",
        _legend(own),
    )


def bland_altman(errors: pd.DataFrame) -> str:
    """Realigned less target, in % of the target's mean, over the mean of the two; the bias of the cells within (0, 1), and 1.96 standard
    deviations to its sides; of those above 1 where there are no others."""
    own = errors[errors["what"] == "realigned"]

    def draw(panel: Axes, scorer: str) -> None:
        rows = own[own["scorer"] == scorer]
        signed = 100 * rows["difference"] / rows["target_mean"].abs()
        panel.axhline(0, color=INK, lw=0.5)
        if len(within := signed[rows["lam"].map(first_range(rows)[1])]) > 1:
            found = limits_of_agreement(within.to_numpy())
            for estimate, style in ((found.bias, "-"), (found.lower, "--"), (found.upper, "--")):
                panel.axhline(estimate.value, color=COLOURS[5], lw=1.2, linestyle=style)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        _points(panel, rows, (rows["mean"] + rows["target_mean"]) / 2, signed, looks(own))

    lines = [
        Line2D([], [], color=COLOURS[5], label="bias"),
        Line2D([], [], color=COLOURS[5], linestyle="--", label="limits of agreement"),
    ]
    return panels(
        list(own["scorer"].unique()),
        draw,
        "mean of the two scores",
        "realigned less target, %",
        [*_legend(own), *lines],
    )


def _points(
    panel: Axes, rows: pd.DataFrame, x: pd.Series, y: pd.Series, look: dict[str, dict[str, Any]]
) -> None:
    for anchor in look:
        for above in (False, True):
            here = (rows["anchor"] == anchor) & ((rows["lam"] > 1) == above)
            panel.plot(x[here], y[here], **look[anchor], **(HOLLOW if above else {}), linestyle="")


def _legend(own: pd.DataFrame) -> list[Line2D]:
    handles = [
        Line2D([], [], **style, linestyle="", label=short(anchor))
        for anchor, style in looks(own).items()
    ]
    if (own["lam"] > 1).any():
        handles.append(
            Line2D(
                [], [], color=INK, marker="o", **HOLLOW, linestyle="", label="hollow: lam above 1"
            )
        )
    return handles
