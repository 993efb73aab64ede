"""What lam does to the scores: over lam, and over the path KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deradiff.anchors.mixtures import anchor_name, parts_of
from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.figures.style import HOLLOW, INK, anchor_styles, dash, panels
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import SampledModel
from deradiff.evaluation.tables.means import mean_scores
from deradiff.evaluation.tables.properties import image_properties
from deradiff.evaluation.tables.table import ResultTable

LINE_COLUMNS = ["anchor", "mode", *SAMPLING_COLUMNS]
"""What tells one line from another."""

TICKS = (0, 0.25, 0.5, 1, 2, 4, 10, 20)
LINEAR_UP_TO = 2
"""Above this lambda the axis is logarithmic past the anchor."""

SMALLEST_GAP = 0.06
"""Between the names of two points, as a share of the axis."""

LineKey = tuple[Any, ...]


def line_key(model: SampledModel) -> LineKey:
    """The line that a model's point lies on."""
    return (model.anchor, model.mode, *model.sampling)


def styles_of_lines(means: pd.DataFrame) -> dict[LineKey, dict[str, Any]]:
    """How each line is drawn: a colour and a marker an anchor, a dash a mode, and its name.

    Args:
        means: the data of the table of mean scores.

    Returns:
        Arguments of matplotlib's plot, by line. The label tells a line from the others.
    """
    models = means.drop_duplicates(LINE_COLUMNS).sort_values(["beta", "anchor", "mode"])
    styles = anchor_styles(models)
    betas_tell = models.drop_duplicates("anchor")["beta"].is_unique
    differing = [c for c in ("mode", *SAMPLING_COLUMNS) if models[c].nunique() > 1]
    lines = {}
    for row in models.to_dict("records"):
        name = anchor_name(row["anchor"])
        if betas_tell and not pd.isna(row["beta"]):
            name = f"anchor beta={row['beta']:g}"
        key = tuple(row[column] for column in LINE_COLUMNS)
        lines[key] = {
            **styles[row["anchor"]],
            "linestyle": dash(row["mode"]),
            "label": ", ".join([name, *(str(row[column]) for column in differing)]),
        }
    return lines


def _points_of_curves(means: pd.DataFrame) -> pd.DataFrame:
    """The rows of the means that lie on a curve over lambda.

    A mixture of several anchors that was sampled at one lambda has a figure of its own.
    """
    lams = means.groupby("anchor")["lam"].transform("nunique")
    is_mixture = means["anchor"].map(parts_of).notna()
    points = means[~is_mixture | (lams > 1)]

    # The reference is on every curve, also of an anchor whose run sampled it under another's name
    key = ["scorer", *LINE_COLUMNS]
    sampling = ["scorer", *SAMPLING_COLUMNS]
    references = points[points["lam"] == 0].drop_duplicates(sampling)
    lines = points.drop_duplicates(key)[[*key, "beta"]]
    at_zero = points.loc[points["lam"] == 0, key].assign(has_reference=True)
    lines = lines.merge(at_zero.drop_duplicates(), how="left", on=key)
    lines = lines[lines["has_reference"].isna()].drop(columns="has_reference")
    borrowed = references.drop(columns=["anchor", "mode", "beta"]).merge(lines, on=sampling)
    return pd.concat([points, borrowed[points.columns]]) if len(borrowed) else points


def score_against_lambda(comparison: Comparison, means: ResultTable | None = None) -> Figure:
    """Mean score over lam, a line an anchor.

    Bands are those of the paired difference to the reference; hollow points are models that were
    aligned from scratch.

    Args:
        comparison: what is compared.
        means: its mean scores, where they are made already.

    Returns:
        A panel a scorer.
    """
    data = (means or mean_scores(comparison)).data
    return _against_lambda(comparison, data, _score_labels(data))


def properties_against_lambda(
    comparison: Comparison, properties: ResultTable | None = None
) -> Figure | None:
    """What the images are like over lam, a line an anchor, as `score_against_lambda` draws scores.

    Args:
        comparison: what is compared.
        properties: the table of its properties, where it is made already.

    Returns:
        A panel a property; None where none was measured.
    """
    if comparison.properties is None:
        return None
    data = (properties or image_properties(comparison)).data
    names = {"property": "scorer", "change": "gain"}
    names |= {f"change_{end}": f"gain_{end}" for end in ("low", "high")}
    return _against_lambda(comparison, data.rename(columns=names), comparison.properties.units)


def _against_lambda(
    comparison: Comparison, means: pd.DataFrame, labels: Mapping[str, str]
) -> Figure:
    """Means over lam, a line an anchor.

    Args:
        comparison: what is compared.
        means: the data of the table of mean scores, or of another one with these columns.
        labels: of the axis of each scorer.

    Returns:
        A panel a scorer.
    """
    data = _points_of_curves(means)
    lines = styles_of_lines(data)

    # The legend
    handles = [Line2D([], [], **style) for style in lines.values()]
    if comparison.cells:
        label = "aligned from scratch at beta / lam"
        hollow: dict[str, Any] = {"linestyle": "", "marker": "o", "markerfacecolor": "none"}
        handles.append(Line2D([], [], **hollow, color=INK, label=label))

    def draw(panel: Axes, scorer: str) -> None:
        own = data[data["scorer"] == scorer]
        for key, style in lines.items():
            _draw_line(panel, _rows_of_line(own, key), style)
        _draw_targets(panel, comparison, own, lines)
        if own["lam"].max() > LINEAR_UP_TO:
            _stretch_axis(panel, own["lam"].max())

    scorers = list(data["scorer"].unique())
    return panels(scorers, draw, "lam", labels, handles)


def _draw_line(panel: Axes, rows: pd.DataFrame, style: dict[str, Any]) -> None:
    """One anchor's scores, with their band."""
    panel.plot(rows["lam"], rows["mean"], **style)
    # The band is the gain's: prompts differ in height, not in what alignment adds
    reference = rows["mean"] - rows["gain"]
    low = reference + rows["gain_low"]
    high = reference + rows["gain_high"]
    panel.fill_between(rows["lam"], low, high, color=style["color"], alpha=0.18, lw=0)


def _draw_targets(
    panel: Axes, comparison: Comparison, own: pd.DataFrame, lines: dict[LineKey, dict[str, Any]]
) -> None:
    """Hollow points: the models that realigned ones should imitate."""
    mean = {SampledModel.of_row(row): row["mean"] for row in own.to_dict("records")}
    for cell in comparison.cells:
        if cell.target not in mean:
            continue
        style = lines[line_key(cell.realigned)]
        look = {"color": style["color"], "marker": style["marker"], **HOLLOW}
        panel.plot([cell.lam], [mean[cell.target]], **look)


def _stretch_axis(panel: Axes, largest: float) -> None:
    """Linear up to the anchor, logarithmic past it."""
    panel.set_xscale("symlog", linthresh=1, linscale=1.5)
    ticks = [lam for lam in TICKS if lam <= largest]
    panel.set_xticks(ticks, [f"{lam:g}" for lam in ticks])
    panel.minorticks_off()


def reward_against_kl(comparison: Comparison, means: ResultTable | None = None) -> Figure | None:
    """Mean score over the square root of the path KL, one line's points named by lam.

    Args:
        comparison: what is compared.
        means: its mean scores, where they are made already.

    Returns:
        A panel a scorer; None where no path KL is known.
    """
    data = _points_of_curves((means or mean_scores(comparison)).data)
    data = data[data["path_kl"].notna()]
    if data.empty or not (data["path_kl"] > 0).any():
        return None
    lines = styles_of_lines(data)
    farthest = data["path_kl"].max() ** 0.5

    # Names at every line would cover one another: the line of the most lambdas has them
    named = max(lines, key=lambda key: _rows_of_line(data, key)["lam"].nunique())

    def draw(panel: Axes, scorer: str) -> None:
        own = data[data["scorer"] == scorer]
        for key, style in lines.items():
            rows = _rows_of_line(own, key)
            panel.plot(rows["path_kl"], rows["mean"], **style)
            if key == named:
                points = list(zip(rows["path_kl"], rows["mean"]))
                name_points(panel, points, [f"{lam:g}" for lam in rows["lam"]], farthest)
        square_root_axis(panel)

    handles = [Line2D([], [], **style) for style in lines.values()]
    xlabel = "path KL to the reference (nats)"
    scorers = list(data["scorer"].unique())
    return panels(scorers, draw, xlabel, _score_labels(data), handles)


def square_root_axis(panel: Axes) -> None:
    """Let the axis of the path KL be that of its square root, which lambda is about linear in."""
    panel.set_xscale("function", functions=(_square_root, np.square))
    panel.set_xlim(left=0)


def _square_root(values: Any) -> Any:
    return np.sqrt(np.maximum(values, 0))


BELOW: dict[str, Any] = {"xytext": (6, -11)}
ABOVE: dict[str, Any] = {"xytext": (-5, 6), "horizontalalignment": "right"}
"""Where a point's name stands: below a line that rises, or above it."""


def name_points(
    panel: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    farthest: float,
    side: dict[str, Any] = BELOW,
) -> None:
    """Write names beside the points that lie far enough from one another.

    Args:
        panel: with an axis of the path KL's square root.
        points: (path KL, score) of each.
        names: of the points.
        farthest: the largest square root of the axis.
        side: `BELOW` or `ABOVE`.
    """
    previous = -np.inf
    for (path_kl, score), name in zip(points, names):
        place = path_kl**0.5
        if place - previous < SMALLEST_GAP * farthest:
            continue
        previous = place
        panel.annotate(name, (path_kl, score), textcoords="offset points", fontsize=9, **side)


def _score_labels(means: pd.DataFrame) -> dict[str, str]:
    labels = {}
    for scorer, scale in zip(means["scorer"], means["scale"]):
        labels[scorer] = f"mean score ({scale})"
    return labels


def _rows_of_line(means: pd.DataFrame, key: LineKey) -> pd.DataFrame:
    """The points of one line, by lambda."""
    same = np.logical_and.reduce([means[c] == value for c, value in zip(LINE_COLUMNS, key)])
    return means[same].sort_values("lam")
