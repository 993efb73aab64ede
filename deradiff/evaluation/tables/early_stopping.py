"""Stopping the training early, or turning lambda down afterwards: which gives more reward?

Both trade reward for path KL. An earlier checkpoint is compared with the last one of its training
at the lambda of the same path KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from deradiff.anchors.mixtures import anchor_name
from deradiff.evaluation.checkpoints import trainings
from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import MODEL_COLUMNS, SampledModel
from deradiff.evaluation.statistics import Array, paired_bootstrap
from deradiff.evaluation.tables.table import (
    NO_ESTIMATE,
    NOT_THERE,
    SAMPLED,
    Column,
    ResultTable,
    Row,
    number,
)

NOTE = """Above the reference: the paired difference in mean score of a checkpoint as it is. The
same path KL: the lam of the training's last checkpoint whose mean path KL is the checkpoint's, and
its score above the reference, both interpolated between the lambdas on either side, linearly in the
square root of the path KL. Gain of early stopping: the checkpoint less the last one at that lam,
paired; above 0, stopping early gives more reward for the same path KL. Brackets: 95 % bootstrap
intervals over prompts, with lam held."""


class Course(NamedTuple):
    """A training's checkpoints as they are, and its last one at smaller lambdas.

    Attributes:
        last: the last checkpoint's anchor.
        mode: in which the last one was realigned.
        checkpoints: by their number, without the last.
        realigned: the reference, the last one's realigned models by lambda, and the last one.
    """

    last: str
    mode: str
    checkpoints: dict[int, SampledModel]
    realigned: list[SampledModel]


def courses_of(comparison: Comparison) -> list[Course]:
    """The trainings of which checkpoints were sampled, with the last one at lambdas below 1."""
    courses = []
    for _, images in comparison.samples.groupby(SAMPLING_COLUMNS, sort=False):
        models = images[images["shares"].isna()].drop_duplicates(MODEL_COLUMNS)
        own = models[models["is_own"] & (models["lam"] == 1)]
        betas = {}
        for anchor, beta in zip(own["anchor"], own["beta"]):
            betas[anchor] = None if pd.isna(beta) else beta
        for checkpoints in trainings(betas):
            courses.extend(_courses(models, own, checkpoints))
    return courses


def _courses(models: pd.DataFrame, own: pd.DataFrame, checkpoints: dict[int, str]) -> list[Course]:
    """The courses of one training: one for each mode of its last checkpoint."""
    *earlier, last = checkpoints
    own_models = _first_models(own)
    references = models[models["is_own"] & (models["lam"] == 0)]
    between = models[
        (models["anchor"] == checkpoints[last]) & models["lam"].between(0, 1, "neither")
    ]
    if references.empty:
        return []
    reference = SampledModel.of_row(references.iloc[0])
    courses = []
    for mode, rows in between.groupby("mode", sort=False):
        inner = [SampledModel.of_row(row) for row in rows.sort_values("lam").to_dict("records")]
        course = Course(
            last=checkpoints[last],
            mode=str(mode),
            checkpoints={number: own_models[checkpoints[number]] for number in earlier},
            realigned=[reference, *inner, own_models[checkpoints[last]]],
        )
        courses.append(course)
    return courses


def _first_models(own: pd.DataFrame) -> dict[str, SampledModel]:
    """One model an anchor: as it is, it gives the same images in every mode."""
    first: dict[str, SampledModel] = {}
    for row in own.to_dict("records"):
        first.setdefault(row["anchor"], SampledModel.of_row(row))
    return first


def early_stopping(comparison: Comparison) -> ResultTable:
    """A row per scorer and earlier checkpoint; no row where there is no such training."""
    path_kl = comparison.samples.groupby(MODEL_COLUMNS)["path_kl"].mean()
    rows = []
    for scorer in comparison.scorers:
        for course in courses_of(comparison):
            for place in course.checkpoints:
                row = _row(comparison, course, place, scorer, path_kl)
                if row:
                    rows.append(row)
    return ResultTable.from_rows("early_stopping", "Early stopping, or lambda", NOTE, rows, COLUMNS)


def _row(
    comparison: Comparison, course: Course, place: int, scorer: str, path_kl: pd.Series
) -> Row:
    """One checkpoint by one scorer; empty where no prompt has all of the images."""
    checkpoint = course.checkpoints[place]
    paired, images = comparison.per_prompt([checkpoint, *course.realigned], scorer)
    if not images:
        return {}
    scores = paired.to_numpy()  # the checkpoint, the reference, ..., the last one
    gain = paired_bootstrap(scores, lambda means: means[..., 0] - means[..., 1])

    # The last one at the lambda of the same path KL
    kl = float(path_kl[checkpoint])
    kls = [0.0, *(float(path_kl[model]) for model in course.realigned[1:])]
    weights = weights_at(kl, kls)
    lam = None
    gain_there = difference = NO_ESTIMATE
    if weights is not None:
        lam = float(weights @ [model.lam for model in course.realigned])
        gain_there = paired_bootstrap(
            scores, lambda means: means[..., 1:] @ weights - means[..., 1]
        )
        difference = paired_bootstrap(
            scores, lambda means: means[..., 0] - means[..., 1:] @ weights
        )
    return {
        "scorer": scorer,
        **checkpoint._asdict(),
        "last": course.last,
        "of_mode": course.mode,
        "checkpoint": place,
        "prompts": len(paired),
        "images": images,
        "path_kl": kl,
        "gain": gain,
        "lam_there": lam,
        "gain_there": gain_there,
        "difference": difference,
    }


def weights_at(path_kl: float, path_kls: Sequence[float]) -> Array | None:
    """How much of each model gives a path KL, between the two on either side of it.

    Path KL grows with about the square of lambda, so it is interpolated by its square root.

    Args:
        path_kl: in nats.
        path_kls: (N,), of models in order, from 0 for the reference.

    Returns:
        (N,), which sum to 1; None where the path KL is not known, or is larger than that of the
        last model, or where those of the models do not grow.
    """
    roots = np.sqrt(path_kls)
    root = np.sqrt(path_kl)
    if not np.all(np.diff(roots) > 0) or not root <= roots[-1]:
        return None
    upper = max(1, int(np.searchsorted(roots, root)))
    share = (root - roots[upper - 1]) / (roots[upper] - roots[upper - 1])
    weights = np.zeros(len(roots))
    weights[upper - 1 : upper + 1] = 1 - share, share
    return weights


def early_stopping_verdict(data: pd.DataFrame) -> str:
    """Which of the two gives more reward, in a sentence; empty where nothing was compared.

    Args:
        data: of `early_stopping`.
    """
    if not len(data) or data["difference"].isna().all():
        return ""
    parts = []
    for scorer, rows in data[data["difference"].notna()].groupby("scorer", sort=False):
        more = int((rows["difference_low"] > 0).sum())
        less = int((rows["difference_high"] < 0).sum())
        parts.append(f"by {scorer}, {more} have clearly more and {less} clearly less")
    count = data[data["difference"].notna()]["anchor"].nunique()
    return (
        f"Early stopping: {count} earlier checkpoints were compared with the last one at the lam "
        f"of the same path KL: {'; '.join(parts)}."
    )


COLUMNS = (
    Column("scorer"),
    Column("training", text=lambda row: anchor_name(row["last"])),
    Column("checkpoint", text=lambda row: str(row["checkpoint"])),
    Column("mode", "of_mode"),
    SAMPLED,
    Column("path KL", "path_kl"),
    Column("above the reference", "gain"),
    Column("lam of the same path KL", text=lambda row: _lam(row["lam_there"])),
    Column("above the reference there", "gain_there"),
    Column("gain of early stopping", "difference"),
)


def _lam(lam: float | None) -> str:
    return NOT_THERE if lam is None else number(lam)
