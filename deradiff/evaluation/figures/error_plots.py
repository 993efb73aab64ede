"""How close realigned models come: ECDF of the errors, scatter, Bland-Altman."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from deradiff.anchors.mixtures import anchor_name
from deradiff.evaluation.agreement import error_ecdf, limits_of_agreement
from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.figures.style import COLOURS, INK, anchor_styles, dash, panels
from deradiff.evaluation.tables.errors import (
    ANCHOR_AS_IS,
    REALIGNED,
    REFERENCE_AS_IS,
    SEED_FLOOR,
    error_rows,
    first_range,
    scores_of_cells,
)
from deradiff.evaluation.tables.table import ResultTable

HOLLOW: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 1.4}
MODEL_COLOURS = {
    REALIGNED: INK,
    ANCHOR_AS_IS: COLOURS[1],
    REFERENCE_AS_IS: COLOURS[4],
    SEED_FLOOR: COLOURS[2],
}
FEWEST_CELLS = 2
"""A figure of a point a cell shows nothing of one."""

PLACES = 200
"""Where a distribution and its band are drawn, beside the errors themselves."""

MARGIN = 1.2
"""How far a distribution's axis goes, in largest errors."""

Styles = dict[str, dict[str, Any]]


def ecdf(comparison: Comparison, approximation: ResultTable | None = None) -> Figure | None:
    """The share of cells whose error is at most x % of the target's mean.

    It is drawn for the realigned models within (0, 1), and for the models that nothing was done to;
    for cells above 1 where there are no others.

    Args:
        comparison: what is compared.
        approximation: its approximation errors, where they are made already.

    Returns:
        A panel a scorer; None where there is no cell.
    """
    if not comparison.cells:
        return None
    errors = error_rows(comparison, approximation)
    threshold = comparison.options.threshold
    range_name, contains = first_range(errors)
    errors = errors[errors["lam"].map(contains)]
    styles = _step_styles(errors)

    def draw(panel: Axes, scorer: str) -> None:
        own = errors[errors["scorer"] == scorer]
        right = MARGIN * max(own["percent_of_mean"].max(), threshold)
        for (name, mode), style in styles.items():
            chosen = _rows_of_model(own, name, mode)
            if len(chosen):
                is_realigned = name == REALIGNED
                _draw_steps(panel, comparison, chosen, style, right, with_band=is_realigned)
        panel.axvline(threshold, color=INK, lw=0.8, linestyle=":")
        _stretch_axis(panel, threshold / 4, right)
        panel.set_ylim(0, 102)

    # The legend
    handles = [Line2D([], [], **style) for style in styles.values()]
    label = f"{threshold:g} % of the mean"
    handles.append(Line2D([], [], color=INK, lw=0.8, linestyle=":", label=label))
    scorers = list(errors["scorer"].unique())
    ylabel = f"% of the cells, {range_name}"
    return panels(scorers, draw, "error, % of the target's mean", ylabel, handles)


def _stretch_axis(panel: Axes, linear_up_to: float, right: float) -> None:
    """From 0 linear, then logarithmic, with a tick at 0 and at each power of ten behind."""
    first = math.ceil(math.log10(linear_up_to))
    last = math.floor(math.log10(right))
    ticks = [0.0, *(10.0**power for power in range(first, last + 1))]
    panel.set_xscale("symlog", linthresh=linear_up_to)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.set_xlim(0, right)


def _step_styles(errors: pd.DataFrame) -> dict[tuple[str, str], dict[str, Any]]:
    """The lines: realigned models of every mode, and the others once.

    A model that nothing was done to is the same in every mode.
    """
    modes = list(errors["mode"].unique())
    styles = {}
    for name in MODEL_COLOURS:
        for mode in modes if name == REALIGNED else modes[:1]:
            if len(_rows_of_model(errors, name, mode)):
                styles[name, mode] = _step_style(name, mode)
    return styles


def _step_style(name: str, mode: str) -> dict[str, Any]:
    is_realigned = name == REALIGNED
    return {
        "color": MODEL_COLOURS[name],
        "linestyle": dash(mode) if is_realigned else "-",
        "lw": 2.2 if is_realigned else 1.3,
        "label": f"realigned, {mode}" if is_realigned else name,
    }


def _rows_of_model(errors: pd.DataFrame, name: str, mode: str) -> pd.DataFrame:
    return errors[(errors["what"] == name) & (errors["mode"] == mode)]


def _draw_steps(
    panel: Axes,
    comparison: Comparison,
    chosen: pd.DataFrame,
    style: dict[str, Any],
    right: float,
    with_band: bool,
) -> None:
    """The distribution of some errors from 0 to the right end of the axis, with its band."""
    model, target, _ = scores_of_cells(comparison, chosen)
    scale = 100 / chosen["target_mean"].abs().to_numpy()
    places = np.append(0, np.geomspace(right / 1000, right, PLACES))
    curve = error_ecdf(model * scale, target * scale, at=places)
    panel.step(curve.x, 100 * curve.share, where="post", **style)
    if with_band:
        colour = style["color"]
        low = 100 * curve.low
        high = 100 * curve.high
        panel.fill_between(curve.x, low, high, step="post", color=colour, alpha=0.15, lw=0)


def scatter(comparison: Comparison, approximation: ResultTable | None = None) -> Figure | None:
    """The realigned model's mean score over the target's, a point a cell, and the identity.

    Points of lam above 1 are hollow.

    Args:
        comparison: what is compared.
        approximation: its approximation errors, where they are made already.

    Returns:
        A panel a scorer; None for less than two cells.
    """
    if len(comparison.cells) < FEWEST_CELLS:
        return None
    own = _realigned_errors(comparison, approximation)
    styles = anchor_styles(own)

    def draw(panel: Axes, scorer: str) -> None:
        rows = own[own["scorer"] == scorer]
        least = min(rows["mean"].min(), rows["target_mean"].min())
        most = max(rows["mean"].max(), rows["target_mean"].max())
        panel.plot([least, most], [least, most], color=INK, lw=0.8)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        _draw_points(panel, rows, rows["target_mean"], rows["mean"], styles)

    scorers = list(own["scorer"].unique())
    legend = _legend(own, styles)
    return panels(scorers, draw, "mean score, from scratch", "mean score, realigned", legend)


def bland_altman(comparison: Comparison, approximation: ResultTable | None = None) -> Figure | None:
    """Realigned less target, in % of the target's mean, over the mean of the two.

    Lines show the bias of the cells within (0, 1) and 1.96 standard deviations to its sides; of the
    cells above 1 where there are no others.

    Args:
        comparison: what is compared.
        approximation: its approximation errors, where they are made already.

    Returns:
        A panel a scorer; None for less than two cells.
    """
    if len(comparison.cells) < FEWEST_CELLS:
        return None
    own = _realigned_errors(comparison, approximation)
    styles = anchor_styles(own)

    def draw(panel: Axes, scorer: str) -> None:
        rows = own[own["scorer"] == scorer]
        signed = 100 * rows["difference"] / rows["target_mean"].abs()
        panel.axhline(0, color=INK, lw=0.5)

        # The bias and the limits of agreement
        _, contains = first_range(rows)
        within = signed[rows["lam"].map(contains)]
        if len(within) > 1:
            limits = limits_of_agreement(within.to_numpy())
            lines = ((limits.bias, "-"), (limits.lower, "--"), (limits.upper, "--"))
            for estimate, linestyle in lines:
                panel.axhline(estimate.value, color=COLOURS[5], lw=1.2, linestyle=linestyle)

        # The cells
        panel.xaxis.set_major_locator(MaxNLocator(4))
        _draw_points(panel, rows, (rows["mean"] + rows["target_mean"]) / 2, signed, styles)

    legend = [
        *_legend(own, styles),
        Line2D([], [], color=COLOURS[5], label="bias"),
        Line2D([], [], color=COLOURS[5], linestyle="--", label="limits of agreement"),
    ]
    scorers = list(own["scorer"].unique())
    ylabel = "realigned less target, %"
    return panels(scorers, draw, "mean of the two scores", ylabel, legend)


def _realigned_errors(comparison: Comparison, approximation: ResultTable | None) -> pd.DataFrame:
    """The errors of the realigned models, a row a cell and scorer."""
    errors = error_rows(comparison, approximation)
    return errors[errors["what"] == REALIGNED] if len(errors) else errors


def _draw_points(
    panel: Axes, rows: pd.DataFrame, x: pd.Series, y: pd.Series, styles: Styles
) -> None:
    """A point a cell, in its anchor's style; hollow above lam = 1."""
    for anchor, style in styles.items():
        for beyond in (False, True):
            here = (rows["anchor"] == anchor) & ((rows["lam"] > 1) == beyond)
            hollow = HOLLOW if beyond else {}
            panel.plot(x[here], y[here], **style, **hollow, linestyle="")


def _legend(own: pd.DataFrame, styles: Styles) -> list[Line2D]:
    handles = []
    for anchor, style in styles.items():
        handles.append(Line2D([], [], **style, linestyle="", label=anchor_name(anchor)))
    if (own["lam"] > 1).any():
        label = "hollow: lam above 1"
        handles.append(Line2D([], [], color=INK, marker="o", **HOLLOW, linestyle="", label=label))
    return handles
