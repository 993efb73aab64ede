"""Every model's mean score."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from deradiff.anchors.mixtures import anchor_name
from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import MODEL_COLUMNS, SampledModel
from deradiff.evaluation.statistics import Estimate, paired_bootstrap
from deradiff.evaluation.tables.table import LAM, NO_ESTIMATE, SAMPLED, Column, ResultTable, Row

NOTE = """Means over prompts, each the mean over its seeds. Brackets: 95 % bootstrap intervals over
prompts. Above the reference: the paired difference to lam = 0, so that what prompts differ in
cancels. Path KL: in nats, of the realigned chain to the reference chain. Scales: """

COLUMNS = (
    Column("scorer"),
    Column("anchor", text=lambda row: anchor_name(row["anchor"])),
    Column("beta"),
    LAM,
    Column("mode"),
    SAMPLED,
    Column("images", text=lambda row: str(row["images"])),
    Column("mean score", "mean"),
    Column("above the reference", "gain"),
    Column("path KL", "path_kl"),
)


def mean_scores(comparison: Comparison) -> ResultTable:
    """Every model's mean score, and how far it lies above the reference's.

    A row a model and scorer.
    """
    samples = comparison.samples
    path_kl = samples.groupby(MODEL_COLUMNS)["path_kl"].mean()
    betas = dict(zip(samples["anchor"], samples["beta"]))
    rows = []
    for model, scores in comparison.by_model.items():
        reference = reference_of(model, list(comparison.by_model))
        for scorer in scores.columns:
            row = _row(comparison, model, reference, scorer, betas[model.anchor])
            if row:
                rows.append(row | {"path_kl": path_kl[model]})

    # By scorer as the user named them
    rows = sorted_rows(rows)
    rows.sort(key=lambda row: list(comparison.scales).index(row["scorer"]))
    scales = "; ".join(f"{scorer} {scale}" for scorer, scale in comparison.scales.items())
    return ResultTable.from_rows("means", "Mean scores", f"{NOTE}{scales}.", rows, COLUMNS)


def reference_of(model: SampledModel, models: list[SampledModel]) -> SampledModel | None:
    """The reference that was sampled as a model was.

    Args:
        model: the model.
        models: all that were sampled.

    Returns:
        The reference of the model's own run where there is one, otherwise the first of another
        run; None where the reference was not sampled.
    """
    references = []
    for other in models:
        if other.is_reference and other.sampling == model.sampling:
            references.append(other)
    references.sort(key=lambda other: other.anchor != model.anchor)
    return references[0] if references else None


def _row(
    comparison: Comparison,
    model: SampledModel,
    reference: SampledModel | None,
    scorer: str,
    beta: float | None,
) -> Row:
    """One model's mean by one scorer; empty where it has no image of the reference's."""
    compared = [model] if reference is None else [model, reference]
    paired, images = comparison.per_prompt(compared, scorer)
    if not images:
        return {}
    gain = NO_ESTIMATE if reference is None else gain_of(paired)
    return {
        "scorer": scorer,
        "scale": comparison.scales[scorer],
        **model._asdict(),
        "beta": beta,
        "prompts": len(paired),
        "images": images,
        "mean": mean_of(paired),
        "gain": gain,
    }


def mean_of(paired: pd.DataFrame) -> Estimate:
    """The mean score of a model.

    Args:
        paired: a row a prompt; the model's scores are the first column.
    """
    return paired_bootstrap(paired.to_numpy(), _own)


def gain_of(paired: pd.DataFrame) -> Estimate:
    """The mean score of a model, less the reference's.

    Args:
        paired: a row a prompt; the model's scores are the first column, the reference's the last.
    """
    return paired_bootstrap(paired.to_numpy(), _gain)


def _own(means: NDArray[np.float64]) -> NDArray[np.float64]:
    return means[..., 0]


def _gain(means: NDArray[np.float64]) -> NDArray[np.float64]:
    return means[..., 0] - means[..., -1]


def sorted_rows(rows: list[Row]) -> list[Row]:
    """Rows of models by sampling, beta, anchor, mode and lambda; what is missing comes last."""

    def order(row: Row) -> tuple[tuple[bool, object], ...]:
        values = []
        for key in (*SAMPLING_COLUMNS, "beta", "anchor", "mode", "lam"):
            value = row[key]
            is_missing = value is None or value != value
            values.append((is_missing, "" if is_missing else value))
        return tuple(values)

    return sorted(rows, key=order)
