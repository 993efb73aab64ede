"""Reward for path KL along a training, and along lambda of its last checkpoint."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deradiff.anchors.mixtures import anchor_name
from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.figures.lambda_curves import ABOVE, BELOW, name_points, square_root_axis
from deradiff.evaluation.figures.style import line_style, panels
from deradiff.evaluation.pairing import MODEL_COLUMNS, SampledModel
from deradiff.evaluation.statistics import Estimate
from deradiff.evaluation.tables.early_stopping import Course, courses_of
from deradiff.evaluation.tables.means import gain_of


def along_the_training(comparison: Comparison) -> Figure | None:
    """Two lines a training: its checkpoints as they are, and lambdas of the last one.

    Args:
        comparison: what is compared.

    Returns:
        A panel a scorer; None where no training has several checkpoints, or no path KL is known.
    """
    path_kl = comparison.samples.groupby(MODEL_COLUMNS)["path_kl"].mean()
    courses = []
    farthest = 0.0
    for course in courses_of(comparison):
        kls = [_path_kl(model, path_kl) for model in _models(course)]
        if np.isfinite(kls).all():
            courses.append(course)
            farthest = max(farthest, *kls)
    if not courses:
        return None

    def draw(panel: Axes, scorer: str) -> None:
        for index, course in enumerate(courses):
            for line in _lines(index, course):
                points = []
                for model in line.models:
                    gain = _gain(comparison, model, course.realigned[0], scorer)
                    points.append((_path_kl(model, path_kl), gain))
                _draw_line(panel, line, points, farthest**0.5)
        square_root_axis(panel)

    handles = []
    for index, course in enumerate(courses):
        for line in _lines(index, course):
            handles.append(Line2D([], [], **line.style))
    xlabel = "path KL to the reference (nats)"
    return panels(comparison.scorers, draw, xlabel, "above the reference", handles)


class _CourseLine(NamedTuple):
    """One line of a course.

    Attributes:
        models: along it, from the reference.
        names: of the points.
        style: of the line, with its label.
        side: where the names stand.
    """

    models: list[SampledModel]
    names: list[str]
    style: dict[str, Any]
    side: dict[str, Any]


def _lines(index: int, course: Course) -> tuple[_CourseLine, _CourseLine]:
    """Lambdas of the last checkpoint, and the checkpoints before it."""
    last = anchor_name(course.last)
    reference, *_, end = course.realigned
    of_lambda = _CourseLine(
        models=course.realigned,
        names=[f"{model.lam:g}" for model in course.realigned],
        style=line_style(2 * index) | {"label": f"lam of {last}, {course.mode}"},
        side=BELOW,
    )
    along_training = _CourseLine(
        models=[reference, *course.checkpoints.values(), end],
        names=["", *map(str, course.checkpoints), ""],
        style=line_style(2 * index + 1) | {"linestyle": "--", "label": f"checkpoints of {last}"},
        side=ABOVE,
    )
    return of_lambda, along_training


def _draw_line(
    panel: Axes, line: _CourseLine, points: list[tuple[float, Estimate]], farthest: float
) -> None:
    """A line with its band and the names of its points."""
    x = [path_kl for path_kl, _ in points]
    gains = [gain.value for _, gain in points]
    low = [gain.low for _, gain in points]
    high = [gain.high for _, gain in points]
    panel.plot(x, gains, **line.style)
    panel.fill_between(x, low, high, color=line.style["color"], alpha=0.12, lw=0)
    name_points(panel, list(zip(x, gains)), line.names, farthest, line.side)


def _models(course: Course) -> list[SampledModel]:
    """All models of a course."""
    return [*course.realigned, *course.checkpoints.values()]


def _path_kl(model: SampledModel, path_kl: pd.Series) -> float:
    """The mean path KL of a model, in nats."""
    return 0.0 if model.is_reference else float(path_kl[model])


def _gain(
    comparison: Comparison, model: SampledModel, reference: SampledModel, scorer: str
) -> Estimate:
    """A model's score above the reference's."""
    paired, _ = comparison.per_prompt([model, reference], scorer)
    return gain_of(paired)
