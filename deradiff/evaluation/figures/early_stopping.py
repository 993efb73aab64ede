"""Reward for path KL along a training, and along lambda of its last checkpoint."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deradiff.anchors.mixtures import anchor_name
from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.figures.lambda_curves import name_points, square_root_axis
from deradiff.evaluation.figures.style import line_style, panels
from deradiff.evaluation.pairing import MODEL_COLUMNS, SampledModel
from deradiff.evaluation.statistics import Estimate
from deradiff.evaluation.tables.early_stopping import Course, courses_of
from deradiff.evaluation.tables.means import gain_of

ALONG_TRAINING = {"linestyle": "--", "markerfacecolor": "none"}
"""How checkpoints are drawn beside lambdas of the same training."""


def along_the_training(comparison: Comparison) -> Figure | None:
    """Two lines a training: its checkpoints as they are, and lambdas of the last one.

    Args:
        comparison: what is compared.

    Returns:
        A panel a scorer; None where no training has several checkpoints, or no path KL is known.
    """
    path_kl = comparison.samples.groupby(MODEL_COLUMNS)["path_kl"].mean()
    courses = []
    for course in courses_of(comparison):
        if all(np.isfinite(path_kl[model]) for model in _models(course)[1:]):
            courses.append(course)
    if not courses:
        return None
    farthest = max(path_kl[model] for course in courses for model in _models(course)) ** 0.5

    def draw(panel: Axes, scorer: str) -> None:
        for index, course in enumerate(courses):
            style = line_style(index)
            lams = [f"{model.lam:g}" for model in course.realigned]
            names = [*map(str, course.checkpoints), "last"]
            checkpoints = [*course.checkpoints.values(), course.realigned[-1]]
            for models, labels, look in (
                (course.realigned, lams, style),
                ([course.realigned[0], *checkpoints], ["", *names], style | ALONG_TRAINING),
            ):
                x, gains = _points(comparison, course, models, scorer, path_kl)
                panel.plot(x, [gain.value for gain in gains], **look)
                low = [gain.low for gain in gains]
                high = [gain.high for gain in gains]
                panel.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)
                values = [gain.value for gain in gains]
                name_points(panel, list(zip(x, values)), labels, farthest)
        square_root_axis(panel)

    handles = []
    for index, course in enumerate(courses):
        name = anchor_name(course.last)
        style = line_style(index)
        handles.append(Line2D([], [], **style, label=f"lam of {name}, {course.mode}"))
        label = f"checkpoints before {name}"
        handles.append(Line2D([], [], **style | ALONG_TRAINING, label=label))
    xlabel = "path KL to the reference (nats)"
    return panels(comparison.scorers, draw, xlabel, "above the reference", handles)


def _models(course: Course) -> list[SampledModel]:
    """All models of a course, the reference first."""
    return [*course.realigned, *course.checkpoints.values()]


def _points(
    comparison: Comparison,
    course: Course,
    models: list[SampledModel],
    scorer: str,
    path_kl: pd.Series,
) -> tuple[list[float], list[Estimate]]:
    """The path KL of each model, and its score above the reference; by path KL."""
    reference = course.realigned[0]
    points = []
    for model in models:
        paired, _ = comparison.per_prompt([model, reference], scorer)
        kl = 0.0 if model.is_reference else float(path_kl[model])
        points.append((kl, gain_of(paired)))
    return [kl for kl, _ in points], [gain for _, gain in points]
