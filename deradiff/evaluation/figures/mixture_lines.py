"""The line between two anchors: each score over the share of the second, and one over another."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.figures.style import HOLLOW, INK, line_style, panels
from deradiff.evaluation.pairing import SampledModel
from deradiff.evaluation.tables.mixtures import Line, lines_of, mixtures_of_anchors
from deradiff.evaluation.tables.table import ResultTable

FEWEST_POINTS = 3
"""A line between two anchors has at least one point between its ends."""


def simplex(comparison: Comparison, table: ResultTable | None = None) -> Figure | None:
    """Each score's gain over the share of the second of two anchors.

    Hollow points are models that were aligned from scratch on the mixed reward.

    Args:
        comparison: what is compared.
        table: its mixtures, where they are known already.

    Returns:
        None where no two anchors were mixed.
    """
    lines = _lines_between_two(comparison)
    if not lines:
        return None
    data = (table or mixtures_of_anchors(comparison)).data
    names = {line.name.partition(" and ")[2] for line in lines}
    second = names.pop() if len(names) == 1 else "the second anchor"

    def draw(panel: Axes, scorer: str) -> None:
        for index, line in enumerate(lines):
            rows = _rows_of(data, line, scorer)
            style = line_style(index)
            panel.plot(rows["second"], rows["gain"], **style)
            panel.fill_between(
                rows["second"],
                rows["gain_low"],
                rows["gain_high"],
                color=style["color"],
                alpha=0.18,
                lw=0,
            )
            targets = rows[rows["target_gain"].notna()]
            panel.plot(targets["second"], targets["target_gain"], **style | HOLLOW)

    xlabel = f"share of {second}"
    return panels(
        list(data["scorer"].unique()), draw, xlabel, "above the reference", _handles(lines)
    )


def trade_off(comparison: Comparison, table: ResultTable | None = None) -> Figure | None:
    """The gain by one scorer over the gain by another, along the line between two anchors.

    Args:
        comparison: what is compared.
        table: its mixtures, where they are known already.

    Returns:
        None where no two anchors were mixed, or where there is one scorer.
    """
    lines = _lines_between_two(comparison)
    if not lines or len(comparison.scorers) < 2:
        return None
    data = (table or mixtures_of_anchors(comparison)).data
    first, *others = comparison.scorers

    def draw(panel: Axes, scorer: str) -> None:
        for index, line in enumerate(lines):
            x = _rows_of(data, line, first)
            y = _rows_of(data, line, scorer)
            both = x.merge(y, on=["anchor", "lam"], suffixes=("_x", "_y"))
            style = line_style(index)
            panel.plot(both["gain_x"], both["gain_y"], **style)
            _name_points(panel, both)
            targets = both[both["target_gain_x"].notna()]
            panel.plot(targets["target_gain_x"], targets["target_gain_y"], **style | HOLLOW)

    xlabel = f"{first}, above the reference"
    labels = {scorer: f"{scorer}, above the reference" for scorer in others}
    return panels(others, draw, xlabel, labels, _handles(lines))


def _lines_between_two(comparison: Comparison) -> list[Line]:
    lines = []
    for line in lines_of(comparison):
        if len(line.anchors) == 2 and len(line.points) >= FEWEST_POINTS:
            lines.append(line)
    return lines


def _rows_of(data: pd.DataFrame, line: Line, scorer: str) -> pd.DataFrame:
    """The rows of a line by one scorer, with the share of its second anchor."""
    shares = {point.model: point.shares[1] for point in line.points}
    of_line = data[(data["scorer"] == scorer) & (data["anchors"] == line.name)]
    rows: list[dict[str, Any]] = []
    for row in of_line.to_dict("records"):
        model = SampledModel.of_row(row)
        if model in shares:
            rows.append(row | {"second": shares.pop(model)})
    return pd.DataFrame(rows).sort_values("second")


def _name_points(panel: Axes, rows: pd.DataFrame) -> None:
    """Write the share of the second anchor beside each point."""
    for row in rows.to_dict("records"):
        panel.annotate(
            f"{row['second_x']:g}",
            (row["gain_x"], row["gain_y"]),
            textcoords="offset points",
            xytext=(6, 5),
            fontsize=9,
        )


def _handles(lines: list[Line]) -> list[Line2D]:
    """The legend: a line's anchors and lam, and what hollow points are."""
    handles = []
    modes = {line.mode for line in lines}
    for index, line in enumerate(lines):
        mode = f", mode {line.mode}" if len(modes) > 1 else ""
        label = f"{line.name} mixed at lam {line.lam:g}{mode}"
        handles.append(Line2D([], [], **line_style(index), label=label))
    if any(map(_has_target, lines)):
        label = "aligned from scratch on the mixed reward"
        handles.append(Line2D([], [], **HOLLOW, marker="o", color=INK, label=label))
    return handles


def _has_target(line: Line) -> bool:
    """Whether some point of a line has a target."""
    return any(point.cell for point in line.points)
