"""The paper's experiment: how far realigned models land from models aligned from scratch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from deradiff.evaluation.agreement import equivalence
from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import Cell, SampledModel
from deradiff.evaluation.statistics import (
    Array,
    Estimate,
    approximation_error,
    mean_approximation_error,
    share_of_anchor,
)
from deradiff.evaluation.tables.table import (
    NO_ESTIMATE,
    NOT_THERE,
    SAMPLED,
    Column,
    ResultTable,
    Row,
    estimate_of,
    interval,
    number,
)

REALIGNED = "realigned"
ANCHOR_AS_IS = "anchor as is"
REFERENCE_AS_IS = "reference as is"
SEED_FLOOR = "seed floor"


def is_within(lam: float) -> bool:
    """Whether a lambda lies between reference and anchor: the paper's range."""
    return 0 < lam < 1


def is_beyond(lam: float) -> bool:
    """Whether a lambda lies beyond the anchor."""
    return lam > 1


RANGES: dict[str, Callable[[float], bool]] = {"0 < lam < 1": is_within, "lam > 1": is_beyond}
PAPER_RANGE = "0 < lam < 1"

ERRORS_NOTE = """Target: the model aligned from scratch at beta / lam, on the same prompts, x_T
and step noise. Error: |mean score of the realigned images less the target's|. % of mean: of the
target's |mean score|. % of distance: of |the target's mean score less the reference's|, that is,
of what aligning from scratch at the target's beta changes; 0 is the target itself, 100 as far
off as the reference; a question mark where that distance is not clear of 0. % of anchor's: the
error in % of |the anchor's mean score less the reference's|, what the anchor itself changed,
where that is clear of 0. Anchor as is, in % of the distance: the anchor at lam = 1, nothing
done. Reference as is: lam = 0 (100 % of the distance by definition). Seed floor, in % of the
distance: a second training seed of the target against the first; what is smaller may be training
noise. Equivalent: two one-sided paired t tests (TOST) at 5 % each put the target less the
realigned model within the margin, {margin:g} % of the distance. Each cell is tested on its own.
Brackets: 95 % bootstrap intervals over prompts."""

SUMMARY_NOTE = """Means over the cells (anchor, lam) of the table of approximation errors, where
the columns are explained. lam = 1 is an identity and no cell. % of distance: over the clear
cells alone, whose distance from reference to target is clear of 0; worst, anchor as is and seed
floor: in that unit too. A mean of absolute values never reaches 0, nor does its interval. Seed
floor: over the cells whose target has a second training seed; under it: cells whose error is at
most what that seed makes. Equivalent: cells that a paired TOST puts within {margin:g} % of the
distance. Every interval, and the errors in the scores' own units: in the csv."""

MODES_NOTE = """Over the cells and the images alone that every mode has, so that the modes' means
are of the same models and prompts. Evaluations of a denoiser an image (of particles, a particle)
and step, as counted while sampling; a model aligned from scratch takes 1. """


def first_range(errors: pd.DataFrame) -> tuple[str, Callable[[float], bool]]:
    """The first of `RANGES` that holds a cell: the paper's range where it holds one.

    Args:
        errors: rows of the table of approximation errors.

    Returns:
        The range's name, and the function that says whether it holds a lambda.

    Raises:
        ValueError: for no rows.
    """
    for name, contains in RANGES.items():
        if errors["lam"].map(contains).any():
            return name, contains
    raise ValueError("there is no error to show")


# --- Every cell ---


def approximation_errors(comparison: Comparison) -> ResultTable:
    """Each model's distance from its target: a row per scorer, cell and compared model.

    The compared models are the realigned one, the anchor as is, the reference as is, and the
    target's other training seeds. People see a line a cell.
    """
    rows = []
    for scorer in comparison.scorers:
        for index, cell in enumerate(comparison.cells):
            for name, model in cell.comparisons():
                row = _error_row(comparison, cell, model, scorer)
                if row:
                    rows.append({"scorer": scorer, "cell": index, "what": name} | row)
    _add_floors(rows)
    margin = comparison.options.margin
    return ResultTable.from_rows(
        "approximation",
        "Approximation errors",
        ERRORS_NOTE.format(margin=margin),
        rows,
        ERROR_COLUMNS,
        display_rows=_lines_of_cells(rows),
    )


def _error_row(comparison: Comparison, cell: Cell, model: SampledModel, scorer: str) -> Row:
    """One model's error in one cell; empty where it shares no image with target and reference."""
    paired, images = comparison.per_prompt([model, cell.target, cell.reference], scorer)
    if not images:
        return {}
    scores, target, reference = paired.to_numpy().T
    error = approximation_error(scores, target, reference)

    # The margin is a share of a distance that is measured on the same prompts. So it is a number
    # for each prompt, and the test compares linear contrasts.
    margins = comparison.options.margin / 100 * (target - reference)
    test = equivalence(scores - target, margins)

    means = paired.mean()
    return {
        "beta": cell.beta,
        "lam": cell.lam,
        "beta_target": cell.beta_target,
        "mode": cell.mode,
        "training_seed": cell.training_seed,
        **dict(zip(SAMPLING_COLUMNS, cell.sampling, strict=True)),
        "anchor": cell.realigned.anchor,
        "target": cell.target.anchor,
        "rival": model.anchor,
        "prompts": len(paired),
        "images": images,
        "mean": means[0],
        "target_mean": means[1],
        "reference_mean": means[2],
        "difference": error.difference,
        "error": error.error,
        "percent_of_mean": error.percent_of_mean,
        "share": error.share,
        "distance": error.distance,
        "share_of_anchor": _share_of_anchor(comparison, cell, model, scorer),
        "clear": error.distance_is_clear,
        "tost_p": test.p,
        "equivalent": test.equivalent,
    }


def _share_of_anchor(
    comparison: Comparison, cell: Cell, model: SampledModel, scorer: str
) -> Estimate:
    if cell.anchor is None:
        return NO_ESTIMATE
    models = [model, cell.target, cell.anchor, cell.reference]
    paired, _ = comparison.per_prompt(models, scorer)
    return share_of_anchor(*paired.to_numpy().T)


def _add_floors(rows: list[Row]) -> None:
    """Give each row the seed floor of its cell.

    The floor is the mean error of the target's other training seeds.
    """
    errors: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row["what"] == SEED_FLOOR:
            errors.setdefault((row["scorer"], row["cell"]), []).append(row["error"].value)
    for row in rows:
        floors = errors.get((row["scorer"], row["cell"]))
        row["floor"] = float(np.mean(floors)) if floors else np.nan


def _lines_of_cells(rows: Iterable[Row]) -> list[Row]:
    """A line a cell: the realigned model's row, with the other models' shares beside it.

    Where there are several second seeds, the first is shown.
    """
    # The first row of each name in each cell
    cells: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        models = cells.setdefault((row["scorer"], row["cell"]), {})
        models.setdefault(row["what"], row)

    # A share of a distance that is not clear of 0 gets a question mark
    lines = []
    for models in cells.values():
        line = dict(models[REALIGNED])
        doubt = "" if line["clear"] else " ?"
        for name in (REALIGNED, ANCHOR_AS_IS, SEED_FLOOR):
            text = NOT_THERE
            if name in models:
                text = interval(models[name]["share"]) + doubt
            line[f"display {name}"] = text
        lines.append(line)
    return lines


def _tost(row: Row) -> str:
    verdict = " (equivalent)" if row["equivalent"] else ""
    return f"{row['tost_p']:.2g}{verdict}"


ERROR_COLUMNS = (
    Column("scorer"),
    Column("anchor beta", "beta"),
    Column("lam"),
    Column("target beta", "beta_target"),
    Column("mode"),
    SAMPLED,
    Column("% of distance", f"display {REALIGNED}"),
    Column("% of anchor's", "share_of_anchor"),
    Column("anchor as is", f"display {ANCHOR_AS_IS}"),
    Column("seed floor", f"display {SEED_FLOOR}"),
    Column("TOST p", text=_tost),
    Column("error"),
    Column("% of mean", "percent_of_mean"),
    Column("mean"),
    Column("target mean", "target_mean"),
)


# --- Means over cells ---


def error_rows(comparison: Comparison, approximation: ResultTable | None) -> pd.DataFrame:
    """The data of the table of approximation errors, which is made where it is not passed.

    Args:
        comparison: what is compared.
        approximation: its approximation errors; None: not made yet.
    """
    return (approximation or approximation_errors(comparison)).data


def summary(comparison: Comparison, approximation: ResultTable | None = None) -> ResultTable:
    """Mean absolute errors per scorer and mode, for lam in (0, 1) and for lam above 1.

    They are those of the realigned models, and of the models that these are compared with.

    Args:
        comparison: what is compared.
        approximation: its approximation errors, where they are made already.
    """
    rows = summary_rows(comparison, error_rows(comparison, approximation))
    note = SUMMARY_NOTE.format(margin=comparison.options.margin)
    return ResultTable.from_rows(
        "summary",
        "Mean approximation errors",
        note,
        rows,
        SUMMARY_COLUMNS,
        display_rows=_lines_of_summary(rows),
    )


def errors_by_mode(comparison: Comparison) -> ResultTable:
    """The summary over the cells and images that every mode has, and what each mode costs.

    Where there is one mode, the table has no row.
    """
    shared = restrict_to_shared(comparison)
    rows = summary_rows(shared, approximation_errors(shared).data)

    # At lam = 0 and 1 a mode evaluates no second network
    samples = comparison.samples
    mixed = samples[~samples["is_own"]]
    for row in rows:
        counts = mixed[mixed["mode"] == row["mode"]]["evaluations"]
        row["evaluations"] = pd.to_numeric(counts).mean()
    note = MODES_NOTE + SUMMARY_NOTE.format(margin=comparison.options.margin)
    return ResultTable.from_rows(
        "modes",
        "The modes side by side",
        note,
        rows,
        [*SUMMARY_COLUMNS, Column("evaluations a step", "evaluations")],
        display_rows=_lines_of_summary(rows),
    )


def restrict_to_shared(comparison: Comparison) -> Comparison:
    """Restrict a comparison to the cells that every mode has, and to the images that these share.

    Where there is one mode, nothing is left.
    """
    all_modes = {cell.mode for cell in comparison.cells}
    if len(all_modes) < 2:
        return comparison.restrict([], {})

    # The modes of each cell, whichever mode it is of
    modes_of: dict[Any, set[str]] = {}
    for cell in comparison.cells:
        modes_of.setdefault(cell.key(), set()).add(cell.mode)
    cells = [cell for cell in comparison.cells if modes_of[cell.key()] == all_modes]
    if not cells:
        return comparison.restrict([], {})

    # The images that all of them have
    scores = comparison.by_model
    ids = scores[cells[0].realigned].index
    for cell in cells:
        ids = ids.intersection(scores[cell.realigned].index)
    shared = {model: rows[rows.index.isin(ids)] for model, rows in scores.items()}
    return comparison.restrict(cells, shared)


def summary_rows(comparison: Comparison, errors: pd.DataFrame) -> list[Row]:
    """The summary's rows: one per range, scorer, mode, way of sampling and compared model.

    Args:
        comparison: what is compared.
        errors: its approximation errors.
    """
    if not len(errors):
        return []
    keys = ["scorer", "mode", *SAMPLING_COLUMNS, "what"]
    rows: list[Row] = []
    for values, group in errors.groupby(keys, sort=False):
        for name, contains in RANGES.items():
            chosen = group[group["lam"].map(contains)]
            if len(chosen):
                row = {"range": name, **dict(zip(keys, values, strict=True))}
                rows.append(row | _means(comparison, chosen))

    # By range, then by scorer, so that modes stand below one another
    scorers = list(dict.fromkeys(row["scorer"] for row in rows))
    ranges = list(RANGES)
    rows.sort(key=lambda row: (ranges.index(row["range"]), scorers.index(row["scorer"])))
    return rows


def scores_of_cells(comparison: Comparison, chosen: pd.DataFrame) -> tuple[Array, Array, Array]:
    """Scores per prompt of some cells: of the compared model, the target and the reference.

    The prompts of all cells can then be drawn together.

    Args:
        comparison: what is compared.
        chosen: C rows of its approximation errors.

    Returns:
        Three arrays (P, C): a row a prompt, a column a row of `chosen`, nan where a cell lacks a
        prompt.
    """
    paired = []
    for row in chosen.to_dict("records"):
        cell = comparison.cells[row["cell"]]
        model = _compared_model(cell, row["what"], row["rival"])
        models = [model, cell.target, cell.reference]
        paired.append(comparison.per_prompt(models, row["scorer"])[0])
    wide = pd.concat(paired, axis=1, keys=range(len(paired)))
    parts = [wide.xs(part, axis=1, level=1).to_numpy() for part in range(3)]
    return parts[0], parts[1], parts[2]


def _compared_model(cell: Cell, name: str, anchor: str) -> SampledModel:
    for its_name, model in cell.comparisons():
        if its_name == name and model.anchor == anchor:
            return model
    raise AssertionError(f"{cell} compares no {name} of {anchor}")


def _means(comparison: Comparison, chosen: pd.DataFrame) -> Row:
    """The means of some rows of the errors."""
    model, target, reference = scores_of_cells(comparison, chosen)
    clear = chosen["clear"].to_numpy(dtype=bool)
    mean = mean_approximation_error(model, target, reference, clear)
    return {
        "cells": len(chosen),
        "prompts": len(model),
        "error": mean.error,
        "percent_of_mean": mean.percent_of_mean,
        "share": mean.share,
        "clear_cells": int(clear.sum()),
        "share_of_anchor": chosen["share_of_anchor"].mean(),
        "worst_share_of_anchor": chosen["share_of_anchor"].max(),
        "worst_share": chosen["share"][clear].max() if clear.any() else np.nan,
        "cells_with_floor": int(chosen["floor"].notna().sum()),
        "cells_under_floor": int((chosen["error"] <= chosen["floor"]).sum()),
        "cells_equivalent": int(chosen["equivalent"].sum()),
    }


def _lines_of_summary(rows: Sequence[Row]) -> list[Row]:
    """A line a range, scorer and mode: the compared models become columns."""
    keys = ("range", "scorer", "mode", *SAMPLING_COLUMNS)
    shares: dict[tuple[Any, ...], Estimate] = {}
    for row in rows:
        group = tuple(row[key] for key in keys)
        shares[*group, row["what"]] = row["share"]

    lines = []
    for row in rows:
        if row["what"] != REALIGNED:
            continue
        line = dict(row)
        group = tuple(row[key] for key in keys)
        for name in (ANCHOR_AS_IS, SEED_FLOOR):
            share = shares.get((*group, name))
            line[f"display {name}"] = number(share.value) if share else NOT_THERE
        lines.append(line)
    return lines


def _clear_cells(row: Row) -> str:
    return f"{row['cells']} ({row['clear_cells']})"


def _under_floor(row: Row) -> str:
    if not row["cells_with_floor"]:
        return NOT_THERE
    return f"{row['cells_under_floor']} of {row['cells_with_floor']}"


def _equivalent_cells(row: Row) -> str:
    return f"{row['cells_equivalent']} of {row['cells']}"


SUMMARY_COLUMNS = (
    Column("range"),
    Column("scorer"),
    Column("mode"),
    SAMPLED,
    Column("cells (clear)", text=_clear_cells),
    Column("% of distance", "share"),
    Column("worst", "worst_share"),
    Column("% of anchor's", "share_of_anchor"),
    Column("worst of anchor's", "worst_share_of_anchor"),
    Column("anchor as is", f"display {ANCHOR_AS_IS}"),
    Column("seed floor", f"display {SEED_FLOOR}"),
    Column("under the floor", text=_under_floor),
    Column("equivalent", text=_equivalent_cells),
)


# --- A sentence ---


def verdict(data: pd.DataFrame, missing: Sequence[str]) -> str:
    """How close realigned models come, in a sentence or two.

    They say the errors with their intervals, how far off the anchor as it is would be, and what may
    not be claimed without a second training seed.

    Args:
        data: of the summary.
        missing: sentences that say what could not be compared.
    """
    if data.empty:
        why = f" ({missing[0]})" if missing else ""
        return (
            "Nothing to compare yet: no realigned model has its target, aligned from scratch, "
            f"among the samples{why}."
        )

    # The paper's range and mode exact, where there are such cells
    name = next(one for one in RANGES if (data["range"] == one).any())
    mode = "exact" if (data["mode"] == "exact").any() else data["mode"].iloc[0]
    rows = data[(data["range"] == name) & (data["mode"] == mode)]
    realigned = rows[rows["what"] == REALIGNED]
    anchor = rows[rows["what"] == ANCHOR_AS_IS]

    # In % of the distance where a scorer has one, otherwise in the paper's unit
    column = "percent_of_mean"
    unit = "of its mean score"
    if realigned["share"].notna().any():
        column = "share"
        unit = "of the way from the reference to it"
    text = (
        f"For {name}, a realigned model misses the model aligned from scratch by "
        f"{_span(realigned, column)} {unit}"
    )
    if anchor[column].notna().any():
        text += f"; the anchor left as it is would miss by {_span(anchor, column)}"
    return f"{text}. {_floor_sentence(realigned)}"


def _floor_sentence(realigned: pd.DataFrame) -> str:
    """How many errors may be training noise."""
    with_floor = int(realigned["cells_with_floor"].sum())
    under = int(realigned["cells_under_floor"].sum())
    if with_floor:
        return (
            f"{under} of {with_floor} errors lie under the seed floor, the difference that a "
            "second training seed makes."
        )
    return (
        "No second training seed of a target was given, so how much of this is training noise is "
        "not known."
    )


def _span(rows: pd.DataFrame, column: str) -> str:
    """The least and the most of a column over scorers, each with its interval and its pairs."""
    rows = rows[rows[column].notna()].sort_values(column)
    ends = rows.iloc[[0, -1]] if len(rows) > 1 else rows
    parts = []
    for row in ends.to_dict("records"):
        value = interval(estimate_of(row, column), " %")
        parts.append(f"{value} ({row['scorer']}, {_pairs(row, column)})")
    return " to ".join(parts)


def _pairs(row: dict[str, Any], column: str) -> str:
    """How many pairs of anchor and target a mean is of."""
    plural = "s" if row["cells"] > 1 else ""
    if column == "share" and row["clear_cells"] < row["cells"]:
        return f"{row['clear_cells']} of {row['cells']} pair{plural} whose distance is clear of 0"
    return f"{row['cells']} pair{plural}"
