"""Every table and figure of an evaluation, with where it stands in the report.

A new table is a function of a `Comparison` and a row of `TABLES`; a new figure a function and a row
of `FIGURES`. It is then written, tracked and shown with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.figures.drawing import Drawing, drawing_of
from deradiff.evaluation.figures.early_stopping import along_the_training
from deradiff.evaluation.figures.error_plots import bland_altman, ecdf, scatter
from deradiff.evaluation.figures.image_grids import first_grid, reversal
from deradiff.evaluation.figures.lambda_curves import (
    properties_against_lambda,
    reward_against_kl,
    score_against_lambda,
)
from deradiff.evaluation.figures.mixture_lines import simplex, trade_off
from deradiff.evaluation.tables.costs import costs_of_anchors, published_cost, savings_of_anchors
from deradiff.evaluation.tables.early_stopping import early_stopping
from deradiff.evaluation.tables.errors import approximation_errors, errors_by_mode, summary
from deradiff.evaluation.tables.judged import judged_pairs
from deradiff.evaluation.tables.means import mean_scores
from deradiff.evaluation.tables.mixtures import mixtures_of_anchors
from deradiff.evaluation.tables.paper import agreement, errors_by_target, paper_errors
from deradiff.evaluation.tables.properties import image_properties
from deradiff.evaluation.tables.scorer_agreement import scorer_agreement
from deradiff.evaluation.tables.selection import selection
from deradiff.evaluation.tables.table import ResultTable
from deradiff.evaluation.tables.wins import win_rates

WHICH_LAMBDA = "which-lambda"
SCORES = "scores"
MIXTURES = "mixtures"
EARLY_STOPPING = "early-stopping"
CLOSENESS = "closeness"
COST = "cost"

SECTIONS = {
    WHICH_LAMBDA: "Which lambda",
    SCORES: "What lam does to the scores",
    MIXTURES: "Several anchors, mixed",
    EARLY_STOPPING: "Early stopping, or lambda",
    CLOSENESS: "How close to models aligned from scratch",
    COST: "What it cost",
}
"""The report's sections and their titles, in order."""


@dataclass(frozen=True)
class TableSpec:
    """A table of the evaluation.

    Attributes:
        name: the name of its files, `tables/<name>.csv` and `.md`.
        section: the report's section that shows it, a key of `SECTIONS`.
        make: makes it from a comparison and from the tables that it needs.
        needs: names of tables that stand above it in `TABLES`, by the argument of `make` that takes
            them. They are made once and passed on.
        folded: the line to click to see it; None: it is open.
        is_tall: whether it scrolls within a window of its own.
    """

    name: str
    section: str
    make: Callable[..., ResultTable]
    needs: Mapping[str, str] = field(default_factory=dict)
    folded: str | None = None
    is_tall: bool = False


@dataclass(frozen=True)
class FigureSpec:
    """A figure of the evaluation.

    Attributes:
        name: the name of its files, `plots/<name>.svg`, `.pdf` and `.png`.
        title: the heading above it.
        caption: what it shows and how to read it.
        section: the report's section that shows it, a key of `SECTIONS`; None: it is a file alone,
            because the report shows the same in another form.
        draw: draws it from a comparison and from the tables that it needs, as a matplotlib figure
            or as SVG text; None where there is nothing to show.
        needs: names of tables, as `TableSpec.needs`.
    """

    name: str
    title: str
    caption: str
    section: str | None
    draw: Callable[..., Figure | str | None]
    needs: Mapping[str, str] = field(default_factory=dict)


ERRORS = {"approximation": "approximation"}
MEANS = {"means": "means"}

TABLES = (
    TableSpec("selection", WHICH_LAMBDA, selection, is_tall=True),
    TableSpec(
        "approximation",
        CLOSENESS,
        approximation_errors,
        folded="Every cell: anchor, lam and target",
    ),
    TableSpec("summary", CLOSENESS, summary, ERRORS),
    TableSpec("modes", CLOSENESS, errors_by_mode),
    TableSpec("paper", CLOSENESS, paper_errors, {"summary_table": "summary", **ERRORS}),
    TableSpec("agreement", CLOSENESS, agreement, ERRORS),
    TableSpec("by_target", CLOSENESS, errors_by_target, ERRORS, is_tall=True),
    TableSpec("wins", CLOSENESS, win_rates, folded="Win rates"),
    TableSpec("judged", SCORES, judged_pairs, is_tall=True),
    TableSpec("scorer_agreement", SCORES, scorer_agreement, is_tall=True),
    TableSpec("means", SCORES, mean_scores, folded="Mean scores of every model"),
    TableSpec(
        "properties", SCORES, image_properties, folded="What the images of every model are like"
    ),
    TableSpec("mixtures", MIXTURES, mixtures_of_anchors, is_tall=True),
    TableSpec("early_stopping", EARLY_STOPPING, early_stopping),
    TableSpec("savings", COST, savings_of_anchors),
    TableSpec("compute", COST, costs_of_anchors),
    TableSpec("published", COST, published_cost),
)

FIGURES = (
    FigureSpec(
        "score_against_lambda",
        "Mean score against lam",
        "Bands: 95 % intervals of the paired difference to the reference. Hollow points, in the "
        "colour of the anchor that they are the target of: the model that was aligned from scratch "
        "at beta / lam.",
        SCORES,
        score_against_lambda,
        MEANS,
    ),
    FigureSpec(
        "properties_against_lambda",
        "What the images are like, against lam",
        "Diversity of the images of a prompt, edges, saturation and colour entropy. More is not "
        "better: what moves far from the reference (lam = 0) should be looked at. Bands: 95 % "
        "intervals of the paired difference to the reference.",
        SCORES,
        properties_against_lambda,
        {"properties": "properties"},
    ),
    FigureSpec(
        "reward_against_kl",
        "Reward against path KL",
        "How much score each nat of divergence from the reference buys; the axis is that of its "
        "square root. The numbers at one line's points are lam.",
        SCORES,
        reward_against_kl,
        MEANS,
    ),
    FigureSpec(
        "reversal",
        "Reward hacking, taken back",
        "The anchor of the smallest beta, and smaller and smaller lam. Each score's paired "
        "difference to the reference, in standard deviations of the reference's scores over "
        "prompts, with 95 % intervals: a score that falls towards the left while another rises was "
        "given up for it.",
        SCORES,
        reversal,
    ),
    FigureSpec(
        "simplex",
        "From one anchor to the other",
        "Each score over the share of the second anchor in the mixture, as a paired difference to "
        "the reference; bands: 95 % intervals. Hollow points: the model that was aligned from "
        "scratch on the rewards in these shares.",
        MIXTURES,
        simplex,
        {"table": "mixtures"},
    ),
    FigureSpec(
        "trade_off",
        "One score against another",
        "The same models: what each mixture gives by one score and by another. The numbers at the "
        "points are the share of the second anchor.",
        MIXTURES,
        trade_off,
        {"table": "mixtures"},
    ),
    FigureSpec(
        "early_stopping",
        "Checkpoints of a training, and lambdas of its last one",
        "Reward for path KL, as a paired difference to the reference, with 95 % bands: along the "
        "training (numbers: of the checkpoint), and along lambda of the last checkpoint (numbers: "
        "lam). The axis is that of the square root.",
        EARLY_STOPPING,
        along_the_training,
    ),
    FigureSpec(
        "pictures",
        "Prompts by lambdas",
        "Prompts down, lambdas across; every image of a prompt starts from the same noise.",
        None,
        first_grid,
    ),
    FigureSpec(
        "ecdf",
        "Errors, as a distribution",
        "The share of cells whose error is at most that of the axis, with a 95 % band of the "
        "realigned models', over prompts. The other lines: the same targets, and models that "
        "nothing was done to.",
        CLOSENESS,
        ecdf,
        ERRORS,
    ),
    FigureSpec(
        "scatter",
        "Realigned against trained from scratch",
        "A point a cell; the line is the identity.",
        CLOSENESS,
        scatter,
        ERRORS,
    ),
    FigureSpec(
        "bland_altman",
        "Bland-Altman",
        "The difference over the mean of the two. Solid: the bias; dashed: 1.96 standard "
        "deviations between cells to either side; both of the cells with lam within (0, 1), where "
        "there are any.",
        CLOSENESS,
        bland_altman,
        ERRORS,
    ),
)


def make_tables(comparison: Comparison) -> dict[str, ResultTable]:
    """Make every table of a comparison.

    Returns:
        The tables by name, empty ones too.
    """
    tables: dict[str, ResultTable] = {}
    for spec in TABLES:
        needed = {argument: tables[name] for argument, name in spec.needs.items()}
        tables[spec.name] = spec.make(comparison, **needed)
    return tables


def draw_figures(comparison: Comparison, tables: Mapping[str, ResultTable]) -> dict[str, Drawing]:
    """Draw every figure of a comparison.

    Args:
        comparison: what is compared.
        tables: its tables, by name.

    Returns:
        Drawings by name, without the figures that have nothing to show.
    """
    drawings = {}
    for spec in FIGURES:
        needed = {argument: tables[name] for argument, name in spec.needs.items()}
        figure = spec.draw(comparison, **needed)
        if figure is not None:
            drawings[spec.name] = drawing_of(figure, spec.title, spec.caption)
    return drawings
