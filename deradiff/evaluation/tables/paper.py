"""The paper's own measures, and its numbers beside ours where the experiment is the paper's.

DeRaDiff, ICLR 2026, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from deradiff.anchors.mixtures import anchor_name
from deradiff.evaluation.agreement import limits_of_agreement
from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import Cards
from deradiff.evaluation.statistics import error_spread
from deradiff.evaluation.tables.errors import (
    PAPER_RANGE,
    RANGES,
    REALIGNED,
    REFERENCE_AS_IS,
    error_rows,
    scores_of_cells,
    summary,
)
from deradiff.evaluation.tables.table import (
    NOT_THERE,
    SAMPLED,
    Column,
    ResultTable,
    Row,
    describe_sampling,
    estimate_of,
    interval,
    number,
)

# --- What the paper publishes ---

BASES = {
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
}
SAMPLER = "euler_ancestral"
STEPS = 50
GUIDANCE = {"sdxl": 5.0, "sd15": 7.5}

MAE = {
    "sdxl": {"clip": (0.001604, 0.430), "hpsv2": (0.000770, 0.265), "pickscore": (0.000355, 0.154)},
    "sd15": {"clip": (0.001557, 0.448), "hpsv2": (0.001175, 0.425), "pickscore": (0.000718, 0.332)},
}
"""Over targets, lambda in [0, 1]: the mean absolute error, and the same in % of the mean."""

BY_TARGET = {
    "pickscore": {500: 1.3451, 1000: 0.7831, 2000: 0.0, 5000: 0.0611, 8000: 0.1399, 10000: 0.0987},
    "hpsv2": {500: 0.5890, 1000: 0.0299, 2000: 0.0, 5000: 0.1701, 8000: 0.2688, 10000: 0.2061},
}
"""Absolute error in %, anchor beta = 2000. CLIP's row has five values for six targets: left out."""

BY_TARGET_BETA = 2000

PAPER_NOTE = """Mean absolute error over the cells, in the scores' own units and in % of |the
target's mean score|. With identities: anchors at lam = 1 counted as cells of no error, which an
average over lambda in [0, 1] may or may not hold. Reference as is: what this measure gives for
the reference, which nothing was done to. Brackets: 95 % bootstrap intervals over prompts."""

BESIDE_NOTE = """The paper's: lambda in [0, 1], 500 prompts, its own anchors, and PickScore and
HPS on a scale of cosines, so only the percentages compare where the scale here is another."""

NOT_BESIDE_NOTE = "The paper's numbers are not shown: this is not its base model and sampler."

AGREEMENT_NOTE = """Over the cells. Median error: in the score's unit, and in % of the standard
deviation of the target's scores over prompts. At most {threshold:g} %: the share, in %, of cells
whose error is at most that of the target's mean (the paper's 0.0005 is 0.217 % of its mean
PickScore, and it reports 87 %, and a median of about 20 % of a standard deviation).
Bland-Altman: the mean of the signed errors, realigned less target, in % of the target's mean,
and the limits of agreement, 1.96 standard deviations between cells to either side of it (the
paper's CLIP: -0.273 %)."""

BY_TARGET_NOTE = """Absolute error in % of the target's mean score, of one anchor (a row)
realigned to every target beta (a column). 0 on the diagonal is the anchor itself, an identity.
Intervals: in the csv."""


def paper_family(anchor: str, row: Mapping[str, Any], cards: Cards) -> str | None:
    """Which of the paper's experiments images belong to, by base model and sampling.

    Args:
        anchor: the images' anchor.
        row: their sampler, steps and guidance_scale.
        cards: of the anchors.

    Returns:
        A key of `MAE`; None: they belong to none.
    """
    family = BASES.get(cards[anchor].base_model) if anchor in cards else None
    if family is None:
        return None
    sampling = (row["sampler"], row["steps"], row["guidance_scale"])
    return family if sampling == (SAMPLER, STEPS, GUIDANCE[family]) else None


# --- The summary in the paper's units ---


def paper_errors(
    comparison: Comparison,
    summary_table: ResultTable | None = None,
    approximation: ResultTable | None = None,
) -> ResultTable:
    """The summary in the paper's units.

    The paper's numbers stand in columns of their own where base model and sampling are the paper's.

    Args:
        comparison: what is compared.
        summary_table: its summary, where it is made already.
        approximation: its approximation errors, where they are made already.
    """
    errors = error_rows(comparison, approximation)
    summary_table = summary_table or summary(comparison, approximation)
    rows = []
    if not summary_table.is_empty:
        data = summary_table.data
        for line in data[data["what"] == REALIGNED].to_dict("records"):
            rows.append(_paper_row(line, errors, comparison.cards))

    has_published = any(not math.isnan(row["paper_error"]) for row in rows)
    columns: tuple[Column, ...] = PAPER_COLUMNS
    note = f"{PAPER_NOTE} {NOT_BESIDE_NOTE}"
    if has_published:
        columns = PAPER_COLUMNS + PUBLISHED_COLUMNS
        note = f"{PAPER_NOTE} {BESIDE_NOTE}"
    return ResultTable.from_rows("paper", "In the paper's measures", note, rows, columns)


def _paper_row(line: dict[str, Any], errors: pd.DataFrame, cards: Cards) -> Row:
    """A line of the summary in the paper's units."""
    # The errors that the line is the mean of
    same = errors["lam"].map(RANGES[line["range"]])
    for key in ("scorer", "mode", *SAMPLING_COLUMNS):
        same = same & (errors[key] == line[key])
    realigned = errors[same & (errors["what"] == REALIGNED)]
    reference = errors[same & (errors["what"] == REFERENCE_AS_IS)]

    published = None
    if line["range"] == PAPER_RANGE:
        published = _published(realigned, line, cards)
    paper_error, paper_percent = published or (math.nan, math.nan)
    identities = line["cells"] / (line["cells"] + realigned["anchor"].nunique())
    keys = ("range", "scorer", "mode", *SAMPLING_COLUMNS, "cells")
    return {
        **{key: line[key] for key in keys},
        "error": estimate_of(line, "error"),
        "percent_of_mean": estimate_of(line, "percent_of_mean"),
        "percent_with_identities": identities * line["percent_of_mean"],
        "reference_percent_of_mean": reference["percent_of_mean"].mean(),
        "paper_error": paper_error,
        "paper_percent_of_mean": paper_percent,
    }


def _published(
    errors: pd.DataFrame, row: Mapping[str, Any], cards: Cards
) -> tuple[float, float] | None:
    """The paper's number for some errors, where all of them belong to one of its experiments."""
    families = {paper_family(anchor, row, cards) for anchor in errors["anchor"]}
    family = families.pop() if len(families) == 1 else None
    return MAE[family].get(row["scorer"]) if family else None


def _with_identities(row: Row) -> str:
    is_papers = row["range"] == PAPER_RANGE
    return number(row["percent_with_identities"]) if is_papers else NOT_THERE


PAPER_COLUMNS = (
    Column("range"),
    Column("scorer"),
    Column("mode"),
    SAMPLED,
    Column("cells", text=lambda row: str(row["cells"])),
    Column("mean error", "error"),
    Column("% of mean", "percent_of_mean"),
    Column("with identities", text=_with_identities),
    Column("reference as is, % of mean", "reference_percent_of_mean"),
)
PUBLISHED_COLUMNS = (
    Column("paper's mean error", "paper_error"),
    Column("paper's % of mean", "paper_percent_of_mean"),
)


# --- How the errors are spread ---


def agreement(comparison: Comparison, approximation: ResultTable | None = None) -> ResultTable:
    """How the realigned models' errors are spread, a row per range, scorer and mode.

    The measures are the median error, the share of errors under a threshold, and Bland and Altman's
    limits of agreement.

    Args:
        comparison: what is compared.
        approximation: its approximation errors, where they are made already.
    """
    rows = _agreement_rows(comparison, error_rows(comparison, approximation))
    threshold = comparison.options.threshold
    columns = (
        Column("range"),
        Column("scorer"),
        Column("mode"),
        SAMPLED,
        Column("cells", text=lambda row: str(row["cells"])),
        Column("median error", text=lambda row: number(row["median"].value)),
        Column("in % of the SD", "median_percent"),
        Column(f"at most {threshold:g} %", "under"),
        Column("Bland-Altman bias, %", text=_bias),
        Column("limits of agreement, %", text=_limits),
    )
    note = AGREEMENT_NOTE.format(threshold=threshold)
    return ResultTable.from_rows("agreement", "How the errors are spread", note, rows, columns)


def _agreement_rows(comparison: Comparison, errors: pd.DataFrame) -> list[Row]:
    if not len(errors):
        return []
    keys = ["scorer", "mode", *SAMPLING_COLUMNS]
    realigned = errors[errors["what"] == REALIGNED]
    rows: list[Row] = []
    for values, group in realigned.groupby(keys, sort=False):
        for name, contains in RANGES.items():
            chosen = group[group["lam"].map(contains)]
            if len(chosen):
                row = {"range": name, **dict(zip(keys, values, strict=True)), "cells": len(chosen)}
                rows.append(row | _agreement(comparison, chosen))
    ranges = list(RANGES)
    rows.sort(key=lambda row: ranges.index(row["range"]))
    return rows


def _agreement(comparison: Comparison, chosen: pd.DataFrame) -> Row:
    """The spread of some rows of the errors."""
    model, target, _ = scores_of_cells(comparison, chosen)
    scale = chosen["target_mean"].abs().to_numpy()
    errors = error_spread(model, target, comparison.options.threshold / 100 * scale)

    # Limits need two cells
    row: Row = {
        "deviation": errors.deviation,
        "median": errors.median,
        "median_percent": errors.median_percent,
        "under": errors.under,
    }
    if len(chosen) > 1:
        limits = limits_of_agreement(100 * chosen["difference"].to_numpy() / scale)
        row |= {"bias": limits.bias, "lower": limits.lower, "upper": limits.upper}
    return row


def _bias(row: Row) -> str:
    return interval(row["bias"]) if "bias" in row else NOT_THERE


def _limits(row: Row) -> str:
    if "bias" not in row:
        return NOT_THERE
    return f"{number(row['lower'].value)} to {number(row['upper'].value)}"


# --- One anchor, every target ---


def errors_by_target(
    comparison: Comparison, approximation: ResultTable | None = None
) -> ResultTable:
    """Absolute error in % of the mean: a row per scorer, anchor and mode, a column per target.

    The paper's row stands below ours where the experiment is the paper's.

    Args:
        comparison: what is compared.
        approximation: its approximation errors, where they are made already.
    """
    errors = error_rows(comparison, approximation)
    title = "One anchor, every target"
    if not len(errors):
        return ResultTable.from_rows("by_target", title, BY_TARGET_NOTE, [], [])

    # A line an anchor, for people
    own = errors[errors["what"] == REALIGNED]
    betas = sorted({*own["beta_target"], *own["beta"]})
    keys = ["scorer", "mode", *SAMPLING_COLUMNS, "beta", "anchor"]
    lines: list[Row] = []
    for values, group in own.groupby(keys, sort=False):
        line = dict(zip(keys, values, strict=True))
        lines += _lines_of_anchor(line, group, betas, comparison.cards)
    columns = [Column("scorer"), Column("anchor"), Column("mode"), Column("sampled")]
    columns += [Column(_beta_header(beta)) for beta in betas]

    # A row a cell, for the csv
    rows = own[BY_TARGET_CSV].to_dict("records")
    return ResultTable.from_rows(
        "by_target", title, BY_TARGET_NOTE, rows, columns, display_rows=lines
    )


def _lines_of_anchor(
    line: dict[str, Any], errors: pd.DataFrame, betas: list[float], cards: Cards
) -> list[Row]:
    """An anchor's line, and the paper's where the experiment is the paper's."""
    head: Row = {
        "scorer": line["scorer"],
        "anchor": anchor_name(line["anchor"]),
        "mode": line["mode"],
        "sampled": describe_sampling(line),
    }

    # Ours; realigned to its own beta, an anchor is itself
    percent = dict(zip(errors["beta_target"], errors["percent_of_mean"]))
    percent[line["beta"]] = 0.0
    lines = [head | {_beta_header(beta): percent.get(beta) for beta in betas}]

    # The paper's
    is_papers = line["beta"] == BY_TARGET_BETA and paper_family(line["anchor"], line, cards)
    published = BY_TARGET.get(line["scorer"]) if is_papers else None
    if published:
        papers = {_beta_header(beta): published.get(int(beta)) for beta in betas}
        lines.append(head | {"anchor": "the paper's, beta 2000"} | papers)
    return lines


def _beta_header(beta: float) -> str:
    return f"beta {beta:,.6g}"


BY_TARGET_CSV = [
    "scorer",
    "anchor",
    "beta",
    "mode",
    *SAMPLING_COLUMNS,
    "lam",
    "beta_target",
    "percent_of_mean",
    "percent_of_mean_low",
    "percent_of_mean_high",
]
