"""The paper's experiment as tables: how far realigned models land from models that were aligned from scratch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from deradiff.evaluation.agreement import equivalence
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import ANCHOR, Cell, Group, per_prompt
from deradiff.evaluation.statistics import (
    Estimate,
    approximation_error,
    mean_approximation_error,
    share_of_anchor,
)
from deradiff.evaluation.tables.table import Table, bench, interval, number, spread, table

RANGES: dict[str, Callable[[float], bool]] = {
    "0 < lam < 1": lambda lam: 0 < lam < 1,
    "lam > 1": lambda lam: lam > 1,
}

ERRORS = """Target: the model aligned from scratch at beta / lam, on the same prompts, x_T and step noise. Error: |mean score of the
realigned images less the target's|. % of mean: of the target's |mean score|. % of distance: of |the target's mean score less the
reference's|, that is, of what aligning from scratch at the target's beta changes; 0 is the target itself, 100 as far off as the
reference; a question mark where that distance is not clear of 0. % of anchor's: the error in % of |the anchor's mean score less the
reference's|, what the anchor itself changed, where that is clear of 0. Anchor as is, in % of the distance: the anchor at lam = 1, nothing
done. Reference as is: lam = 0 (100 % of the distance by definition). Seed floor, in % of the distance: a second training seed of the
target against the first; what is smaller may be training noise. Equivalent: two one-sided paired t tests (TOST) at 5 % each put the
target less the realigned model within the margin, {margin:g} % of the distance. Each cell is tested on its own. Brackets: 95 % bootstrap
intervals over prompts."""

SUMMARY = """Means over the cells (anchor, lam) of the table of approximation errors, where the columns are explained. lam = 1 is an
identity and no cell. % of distance: over the clear cells alone, whose distance from reference to target is clear of 0; worst, anchor as
is and seed floor: in that unit too. A mean of absolute values never reaches 0, nor does its interval. Seed floor: over the cells whose
target has a second training seed; under it: cells whose error is at most what that seed makes. Equivalent: cells that a paired TOST puts
within {margin:g} % of the distance. Every interval, and the errors in the scores' own units: in the csv."""

MODES = """Over the cells and the images alone that every mode has, so that the modes' means are of the same models and prompts.
Evaluations of a denoiser an
image (of particles, a particle) and step, as counted while sampling; a model aligned from scratch takes 1. """


def first_range(errors: pd.DataFrame) -> tuple[str, Callable[[float], bool]]:
    """The first of RANGES that holds a cell of some errors: the paper's, where there is one."""
    return next(
        (name, within) for name, within in RANGES.items() if errors["lam"].map(within).any()
    )


def approximation_errors(
    cells: list[Cell], groups: dict[Group, pd.DataFrame], scorers: list[str], margin: float
) -> Table:
    """A row per scorer, cell and rival: the realigned model, the anchor as is, the reference as is, the target's other training seeds.

    margin: of the equivalence test, in percent of the distance.
    """
    data = pd.DataFrame(
        [
            {"scorer": scorer, "cell": index, "what": what} | row
            for scorer in scorers
            for index, cell in enumerate(cells)
            for what, rival in cell.rivals()
            if (row := _row(cell, rival, groups, scorer, margin))
        ]
    )
    if len(data):
        floors = data[data["what"] == "seed floor"].groupby(["scorer", "cell"])["error"].mean()
        data["floor"] = [floors.get(key, np.nan) for key in zip(data["scorer"], data["cell"])]
    return table(
        "approximation", "Approximation errors", ERRORS.format(margin=margin), data, _shown(data)
    )


def _row(
    cell: Cell, rival: Group, groups: dict[Group, pd.DataFrame], scorer: str, margin: float
) -> dict[str, Any]:
    paired, images = per_prompt(groups, [rival, cell.target, cell.reference], scorer)
    if not images:
        return {}
    model, target, reference = paired.to_numpy().T
    found = approximation_error(model, target, reference)
    # the margin is a share of a distance that is measured on the same prompts, so it is a number a prompt: what the test compares is linear
    tested = equivalence(model - target, margin / 100 * (target - reference))
    means = paired.mean()
    told = {
        "beta": cell.beta,
        "lam": cell.lam,
        "beta_target": cell.beta_target,
        "mode": cell.mode,
        "training_seed": cell.training_seed,
    }
    who = {"anchor": cell.realigned[ANCHOR], "target": cell.target[ANCHOR], "rival": rival[ANCHOR]}
    count = {
        "prompts": len(paired),
        "images": images,
        "mean": means[0],
        "target_mean": means[1],
        "reference_mean": means[2],
    }
    numbers = [
        spread(name, getattr(found, name))
        for name in ("difference", "error", "percent_of_mean", "share", "distance")
    ]
    numbers.append(spread("share_of_anchor", _share_of_anchor(cell, rival, groups, scorer)))
    return (
        told
        | dict(zip(SAMPLING_COLUMNS, cell.bench))
        | who
        | count
        | {k: v for n in numbers for k, v in n.items()}
        | {"clear": found.distance_is_clear, "tost_p": tested.p, "equivalent": tested.equivalent}
    )


def _share_of_anchor(
    cell: Cell, rival: Group, groups: dict[Group, pd.DataFrame], scorer: str
) -> Estimate:
    if cell.anchor is None:
        return Estimate(np.nan, np.nan, np.nan)
    paired, _ = per_prompt(groups, [rival, cell.target, cell.anchor, cell.reference], scorer)
    return share_of_anchor(*paired.to_numpy().T)


def _shown(data: pd.DataFrame) -> list[dict[str, str]]:
    """A line a cell: the rivals become columns. Where there are several second seeds, the first is shown."""
    lines = []
    for _, rows in data.groupby(["scorer", "cell"], sort=False) if len(data) else []:
        by = {row["what"]: row for row in reversed(rows.to_dict("records"))}
        own, doubt = by["realigned"], "" if by["realigned"]["clear"] else " ?"
        share = {what: interval(row, "share") + doubt for what, row in by.items()}
        lines.append(
            {
                "scorer": own["scorer"],
                "anchor beta": number(own["beta"]),
                "lam": number(own["lam"]),
                "target beta": number(own["beta_target"]),
                "mode": own["mode"],
                "sampled": bench(own),
                "% of distance": share["realigned"],
                "% of anchor's": interval(own, "share_of_anchor"),
                "anchor as is": share.get("anchor as is", "–"),
                "seed floor": share.get("seed floor", "–"),
                "TOST p": f"{own['tost_p']:.2g}{' (equivalent)' if own['equivalent'] else ''}",
                "error": interval(own, "error"),
                "% of mean": interval(own, "percent_of_mean"),
                "mean": number(own["mean"]),
                "target mean": number(own["target_mean"]),
            }
        )
    return lines


def summary(
    errors: pd.DataFrame, cells: list[Cell], groups: dict[Group, pd.DataFrame], margin: float
) -> Table:
    """Mean absolute errors per scorer and mode, for lam in (0, 1) and for lam above 1, of the realigned models and of their rivals."""
    rows = _summary(errors, cells, groups)
    return table(
        "summary",
        "Mean approximation errors",
        SUMMARY.format(margin=margin),
        pd.DataFrame(rows),
        _summary_shown(rows),
    )


def modes(
    cells: list[Cell],
    groups: dict[Group, pd.DataFrame],
    scorers: list[str],
    margin: float,
    samples: pd.DataFrame,
) -> Table:
    """The summary again over the cells, prompts and seeds that every mode has, and what each mode costs; no row where there is one mode."""
    cells, groups = _shared(cells, groups)
    rows = _summary(approximation_errors(cells, groups, scorers, margin).data, cells, groups)
    cost = (
        samples[~samples["lam"].isin([0, 1])]
        .groupby("mode")["evaluations"]
        .apply(lambda e: pd.to_numeric(e).mean())
    )
    rows = [row | {"evaluations": cost[row["mode"]]} for row in rows]
    shown = [
        line | {"evaluations a step": number(cost[line["mode"]])} for line in _summary_shown(rows)
    ]
    return table(
        "modes",
        "The modes side by side",
        MODES + SUMMARY.format(margin=margin),
        pd.DataFrame(rows),
        shown,
    )


def _shared(
    cells: list[Cell], groups: dict[Group, pd.DataFrame]
) -> tuple[list[Cell], dict[Group, pd.DataFrame]]:
    """The cells that every mode realigned, with the images that all of these share; none where there is one mode."""
    modes = {cell.mode for cell in cells}
    of = {
        cell: {
            c.mode
            for c in cells
            if (c.target, c.lam, c.realigned[ANCHOR])
            == (cell.target, cell.lam, cell.realigned[ANCHOR])
        }
        for cell in cells
    }
    shared = [cell for cell in cells if of[cell] == modes] if len(modes) > 1 else []
    if not shared:
        return [], {}
    ids = groups[shared[0].realigned].index
    for cell in shared:
        ids = ids.intersection(groups[cell.realigned].index)
    return shared, {group: scores[scores.index.isin(ids)] for group, scores in groups.items()}


def _summary(
    errors: pd.DataFrame, cells: list[Cell], groups: dict[Group, pd.DataFrame]
) -> list[dict[str, Any]]:
    keys, rows = ["scorer", "mode", *SAMPLING_COLUMNS, "what"], []
    for told, found in errors.groupby(keys, sort=False) if len(errors) else []:
        for name, within in RANGES.items():
            chosen = found[found["lam"].map(within)]
            if len(chosen):
                rows.append({"range": name} | dict(zip(keys, told)) | _means(chosen, cells, groups))
    order = list(dict.fromkeys(row["scorer"] for row in rows))
    return sorted(
        rows, key=lambda row: (list(RANGES).index(row["range"]), order.index(row["scorer"]))
    )  # modes below one another


def aligned(
    chosen: pd.DataFrame, cells: list[Cell], groups: dict[Group, pd.DataFrame]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Scores of the model, the target and the reference, each (P, C): a row a prompt, a column for each of `chosen`, some rows of the
    errors; nan where a cell lacks a prompt. So that the prompts can be drawn together for all of them."""
    paired = []
    for row in chosen.to_dict("records"):
        cell = cells[row["cell"]]
        rival = next(
            group
            for what, group in cell.rivals()
            if (what, group[ANCHOR]) == (row["what"], row["rival"])
        )
        paired.append(per_prompt(groups, [rival, cell.target, cell.reference], row["scorer"])[0])
    wide = pd.concat(paired, axis=1, keys=range(len(paired)))
    model, target, reference = (wide.xs(part, axis=1, level=1).to_numpy() for part in range(3))
    return model, target, reference


def _means(
    chosen: pd.DataFrame, cells: list[Cell], groups: dict[Group, pd.DataFrame]
) -> dict[str, Any]:
    """The means of some rows of the errors."""
    model, target, reference = aligned(chosen, cells, groups)
    clear = chosen["clear"].to_numpy(dtype=bool)
    found = mean_approximation_error(model, target, reference, clear)
    return {
        "cells": len(chosen),
        "prompts": len(model),
        **spread("error", found.error),
        **spread("percent_of_mean", found.percent_of_mean),
        **spread("share", found.share),
        "clear_cells": int(clear.sum()),
        "share_of_anchor": chosen["share_of_anchor"].mean(),
        "worst_share_of_anchor": chosen["share_of_anchor"].max(),
        "worst_share": chosen["share"][clear].max() if clear.any() else np.nan,
        "cells_with_floor": int(chosen["floor"].notna().sum()),
        "cells_under_floor": int((chosen["error"] <= chosen["floor"]).sum()),
        "cells_equivalent": int(chosen["equivalent"].sum()),
    }


def _summary_shown(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A line a range, scorer and mode: the rivals become columns."""
    lines = []
    for own in (row for row in rows if row["what"] == "realigned"):
        same = ("range", "scorer", "mode", *SAMPLING_COLUMNS)
        by = {row["what"]: row for row in rows if all(row[key] == own[key] for key in same)}
        rival = {what: number(row["share"]) for what, row in by.items()}
        lines.append(
            {
                "range": own["range"],
                "scorer": own["scorer"],
                "mode": own["mode"],
                "sampled": bench(own),
                "cells (clear)": f"{own['cells']} ({own['clear_cells']})",
                "% of distance": interval(own, "share"),
                "worst": number(own["worst_share"]),
                "% of anchor's": number(own["share_of_anchor"]),
                "worst of anchor's": number(own["worst_share_of_anchor"]),
                "anchor as is": rival.get("anchor as is", "–"),
                "seed floor": rival.get("seed floor", "–"),
                "under the floor": f"{own['cells_under_floor']} of {own['cells_with_floor']}"
                if own["cells_with_floor"]
                else "–",
                "equivalent": f"{own['cells_equivalent']} of {own['cells']}",
            }
        )
    return lines
