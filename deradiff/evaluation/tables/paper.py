"""The paper's own measures, and its numbers beside ours where the experiment is the paper's (DeRaDiff, ICLR 2026, section 5)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from deradiff.anchors.anchor import AnchorCard
from deradiff.evaluation.agreement import limits_of_agreement
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import Cell, Group, short
from deradiff.evaluation.statistics import error_spread
from deradiff.evaluation.tables.errors import RANGES, aligned
from deradiff.evaluation.tables.table import Table, bench, interval, number, spread, table

BASES = {
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
}
GUIDANCE = {"sdxl": 5.0, "sd15": 7.5}
MAE = {  # over targets, lambda in [0, 1]: the mean absolute error, and in % of the mean
    "sdxl": {"clip": (0.001604, 0.430), "hpsv2": (0.000770, 0.265), "pickscore": (0.000355, 0.154)},
    "sd15": {"clip": (0.001557, 0.448), "hpsv2": (0.001175, 0.425), "pickscore": (0.000718, 0.332)},
}
# Absolute error in %, anchor beta = 2000. The row of CLIP has five values for six targets, so it is left out.
BY_TARGET = {
    "pickscore": {500: 1.3451, 1000: 0.7831, 2000: 0.0, 5000: 0.0611, 8000: 0.1399, 10000: 0.0987},
    "hpsv2": {500: 0.5890, 1000: 0.0299, 2000: 0.0, 5000: 0.1701, 8000: 0.2688, 10000: 0.2061},
}

PAPER = """Mean absolute error over the cells, in the scores' own units and in % of |the target's mean score|. With identities: anchors at
lam = 1 counted as cells of no error, which an average over lambda in [0, 1] may or may not hold. Reference as is: what this measure gives
for the reference, which nothing was done to. Brackets: 95 % bootstrap intervals over prompts."""
BESIDE = """The paper's: lambda in [0, 1], 500 prompts, its own anchors, and PickScore and HPS on a scale of cosines, so only the
percentages compare where the scale here is another."""

AGREEMENT = """Over the cells. Median error: in the score's unit, and in % of the standard deviation of the target's scores over prompts.
At most {threshold:g} %: the share, in %, of cells whose error is at most that of the target's mean (the paper's 0.0005 is 0.217 % of its
mean PickScore, and it reports 87 %, and a median of about 20 % of a standard deviation). Bland-Altman: the mean of the signed errors,
realigned less target, in % of the target's mean, and the limits of agreement, 1.96 standard deviations between cells to either side of it
(the paper's CLIP: -0.273 %)."""

BY = """Absolute error in % of the target's mean score, of one anchor (a row) realigned to every target beta (a column). 0 on the diagonal
is the anchor itself, an identity. Intervals: in the csv."""


def paper_errors(
    summary: pd.DataFrame, errors: pd.DataFrame, cards: dict[str, AnchorCard]
) -> Table:
    """The summary in the paper's units, with the paper's numbers in columns of their own where base model and sampling are the paper's."""
    shown, rows, beside = [], [], False
    for own in summary[summary["what"] == "realigned"].to_dict("records") if len(summary) else []:
        same = np.logical_and.reduce(
            [errors[c] == own[c] for c in ("scorer", "mode", *SAMPLING_COLUMNS)]
        ) & errors["lam"].map(RANGES[own["range"]])
        chosen = errors[same & (errors["what"] == "realigned")]
        identities = own["cells"] / (own["cells"] + chosen["anchor"].nunique())
        as_is = errors[same & (errors["what"] == "reference as is")]["percent_of_mean"].mean()
        published = _published(chosen, own, cards) if own["range"] == "0 < lam < 1" else None
        beside = beside or published is not None
        told = {key: own[key] for key in ("range", "scorer", "mode", *SAMPLING_COLUMNS, "cells")}
        ours = {key: own[key] for key in own if key.startswith(("error", "percent_of_mean"))}
        more = {
            "percent_with_identities": identities * own["percent_of_mean"],
            "reference_percent_of_mean": as_is,
        }
        paper = dict(
            zip(("paper_error", "paper_percent_of_mean"), published or (math.nan, math.nan))
        )
        rows.append(told | ours | more | paper)
        shown.append(
            {
                "range": own["range"],
                "scorer": own["scorer"],
                "mode": own["mode"],
                "sampled": bench(own),
                "cells": str(own["cells"]),
                "mean error": interval(own, "error"),
                "% of mean": interval(own, "percent_of_mean"),
                "with identities": number(more["percent_with_identities"])
                if own["range"] == "0 < lam < 1"
                else "–",
                "reference as is, % of mean": number(as_is),
                "paper's mean error": number(paper["paper_error"]),
                "paper's % of mean": number(paper["paper_percent_of_mean"]),
            }
        )
    if not beside:
        shown = [
            {key: text for key, text in row.items() if not key.startswith("paper's")}
            for row in shown
        ]
    note = (
        f"{PAPER} {BESIDE}"
        if beside
        else f"{PAPER} The paper's numbers are not shown: this is not its base model and sampler."
    )
    return table("paper", "In the paper's measures", note, pd.DataFrame(rows), shown)


def _family(anchor: str, row: Any, cards: dict[str, AnchorCard]) -> str | None:
    """Which of the paper's experiments images belong to: by base model, sampler, steps and guidance; None: to none."""
    family = BASES.get(cards[anchor].base_model) if anchor in cards else None
    as_paper = (row["sampler"], row["steps"], row["guidance_scale"]) == (
        "euler_ancestral",
        50,
        GUIDANCE.get(family or ""),
    )
    return family if as_paper else None


def _published(
    chosen: pd.DataFrame, row: Any, cards: dict[str, AnchorCard]
) -> tuple[float, float] | None:
    families = {_family(anchor, row, cards) for anchor in chosen["anchor"]}
    family = families.pop() if len(families) == 1 else None
    return MAE[family].get(row["scorer"]) if family else None


def agreement(
    errors: pd.DataFrame, cells: list[Cell], groups: dict[Group, pd.DataFrame], threshold: float
) -> Table:
    """Median error, share of errors under a threshold, and Bland-Altman's limits, over the realigned cells of a scorer and mode."""
    rows, keys = [], ["scorer", "mode", *SAMPLING_COLUMNS]
    for told, found in (
        errors[errors["what"] == "realigned"].groupby(keys, sort=False) if len(errors) else []
    ):
        for name, within in RANGES.items():
            chosen = found[found["lam"].map(within)]
            if len(chosen):
                rows.append(
                    {"range": name}
                    | dict(zip(keys, told))
                    | {"cells": len(chosen)}
                    | _agreement(chosen, cells, groups, threshold)
                )
    rows.sort(key=lambda row: list(RANGES).index(row["range"]))
    shown = [
        {
            "range": row["range"],
            "scorer": row["scorer"],
            "mode": row["mode"],
            "sampled": bench(row),
            "cells": str(row["cells"]),
            "median error": number(row["median"]),
            "in % of the SD": interval(row, "median_percent"),
            f"at most {threshold:g} %": interval(row, "under"),
            "Bland-Altman bias, %": interval(row, "bias") if "bias" in row else "–",
            "limits of agreement, %": f"{number(row['lower'])} to {number(row['upper'])}"
            if "bias" in row
            else "–",
        }
        for row in rows
    ]
    return table(
        "agreement",
        "How the errors are spread",
        AGREEMENT.format(threshold=threshold),
        pd.DataFrame(rows),
        shown,
    )


def _agreement(
    chosen: pd.DataFrame, cells: list[Cell], groups: dict[Group, pd.DataFrame], threshold: float
) -> dict[str, float]:
    model, target, _ = aligned(chosen, cells, groups)
    scale = chosen["target_mean"].abs().to_numpy()
    errors = error_spread(model, target, threshold / 100 * scale)
    found = {name: getattr(errors, name) for name in ("median", "median_percent", "under")}
    if len(chosen) > 1:
        limits = limits_of_agreement(100 * chosen["difference"].to_numpy() / scale)
        found |= {name: getattr(limits, name) for name in ("bias", "lower", "upper")}
    return {"deviation": errors.deviation} | {
        key: value
        for name, estimate in found.items()
        for key, value in spread(name, estimate).items()
    }


def by_target(errors: pd.DataFrame, cards: dict[str, AnchorCard]) -> Table:
    """Absolute error in % of the mean, a row per scorer, anchor and mode, a column per target beta; the paper's row below ours."""
    own = errors[errors["what"] == "realigned"] if len(errors) else errors
    keys = ["scorer", "mode", *SAMPLING_COLUMNS, "beta", "anchor"]
    betas = sorted({*own["beta_target"], *own["beta"]}) if len(own) else []
    shown = []
    for told, found in own.groupby(keys, sort=False) if len(own) else []:
        line = dict(zip(keys, told))
        errors_of = dict(zip(found["beta_target"], found["percent_of_mean"])) | {line["beta"]: 0.0}
        head = {
            "scorer": line["scorer"],
            "anchor": short(line["anchor"]),
            "mode": line["mode"],
            "sampled": bench(line),
        }
        shown.append(head | {_beta(beta): number(errors_of.get(beta)) for beta in betas})
        published = (
            BY_TARGET.get(line["scorer"], {})
            if line["beta"] == 2000 and _family(line["anchor"], line, cards)
            else {}
        )
        if published:
            shown.append(
                head
                | {"anchor": "the paper's, beta 2000"}
                | {_beta(beta): number(published.get(int(beta))) for beta in betas}
            )
    columns = [
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
    return table(
        "by_target", "One anchor, every target", BY, own[columns] if len(own) else own, shown
    )


def _beta(beta: float) -> str:
    return f"beta {beta:,.6g}"
