"""Mixtures of several anchors: what they score, beside models aligned on the mixed reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from deradiff.anchors.mixtures import anchor_name
from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.pairing import MODEL_COLUMNS, Cell, SampledModel
from deradiff.evaluation.statistics import approximation_error
from deradiff.evaluation.tables.means import gain_of, mean_of, reference_of
from deradiff.evaluation.tables.table import (
    LAM,
    NO_ESTIMATE,
    NOT_THERE,
    SAMPLED,
    Column,
    ResultTable,
    Row,
    interval,
    number,
)

NOTE = """A mixture of anchors at lam is p_ref^(1 - lam) (prod p_i^share_i)^lam; an anchor alone
stands where its share is all. Target: the model that was aligned from scratch on the rewards in
these shares, on the same prompts and noise, where one was sampled. % of distance: the error, that
is |mean score of the mixture less the target's|, in % of what aligning from scratch changes,
|the target's mean score less the reference's|; a question mark where that is not clear of 0.
Second seed: of another training seed of the target, in the same unit. Brackets: 95 % bootstrap
intervals over prompts."""


class Point(NamedTuple):
    """One point between several anchors.

    Attributes:
        model: the sampled model.
        shares: of the anchors, in the order of the line; 0 for those that it does not hold.
        cell: with its target; None: nobody trained or sampled it.
    """

    model: SampledModel
    shares: tuple[float, ...]
    cell: Cell | None


class Line(NamedTuple):
    """The models between several anchors that share lam, mode and sampling.

    Attributes:
        anchors: their names, in order.
        lam: of the mixtures, the sum of the anchors' |lambda|.
        mode: the mode's label.
        sampling: values of `deradiff.evaluation.manifest.SAMPLING_COLUMNS`.
        points: by share of the first anchor, the largest first.
    """

    anchors: tuple[str, ...]
    lam: float
    mode: str
    sampling: tuple[Any, ...]
    points: list[Point]

    @property
    def name(self) -> str:
        """The anchors for people."""
        return " and ".join(map(anchor_name, self.anchors))


def lines_of(comparison: Comparison) -> list[Line]:
    """The mixtures of a comparison, and the anchors at their ends, by what they are mixtures of."""
    samples = comparison.samples
    models = samples[samples["realigned"]].drop_duplicates(MODEL_COLUMNS)
    cells = {cell.realigned: cell for cell in comparison.mixtures}
    lines: dict[tuple[Any, ...], Line] = {}
    for row in models[models["shares"].notna()].to_dict("records"):
        model = SampledModel.of_row(row)
        key = (frozenset(row["shares"]), model.lam, model.mode, model.sampling)
        if key not in lines:
            anchors = tuple(row["shares"])
            lines[key] = Line(anchors, model.lam, model.mode, model.sampling, [])
        line = lines[key]
        shares = _shares_in_order(row["shares"], line.anchors)
        line.points.append(Point(model, shares, cells.get(model)))
    for line in lines.values():
        line.points.extend(_ends(line, models))
        line.points.sort(key=lambda point: point.shares, reverse=True)
    return list(lines.values())


def _shares_in_order(shares: Mapping[str, float], anchors: tuple[str, ...]) -> tuple[float, ...]:
    """The share of each anchor; 0 where it has none."""
    return tuple(shares.get(anchor, 0.0) for anchor in anchors)


def _ends(line: Line, models: pd.DataFrame) -> list[Point]:
    """The anchors of a line alone, at its lam; at lam = 1 every mode gives the same images."""
    ends = []
    for anchor in line.anchors:
        is_end = (models["anchor"] == anchor) & (models["lam"] == line.lam)
        for row in models[is_end].to_dict("records"):
            model = SampledModel.of_row(row)
            is_alike = row["is_own"] or model.mode == line.mode
            if is_alike and model.sampling == line.sampling:
                ends.append(Point(model, _shares_in_order({anchor: 1.0}, line.anchors), None))
                break
    return ends


def mixtures_of_anchors(comparison: Comparison) -> ResultTable:
    """A row per scorer and point between several anchors; no row where none was sampled."""
    rows = []
    for scorer in comparison.scorers:
        for line in lines_of(comparison):
            for point in line.points:
                row = _row(comparison, line, point, scorer)
                if row:
                    rows.append(row)
    return ResultTable.from_rows("mixtures", "Mixtures of anchors", NOTE, rows, COLUMNS)


def _row(comparison: Comparison, line: Line, point: Point, scorer: str) -> Row:
    """One point by one scorer; empty where it has no image that the reference has."""
    model = point.model
    reference = reference_of(model, list(comparison.by_model))
    compared = [model] if reference is None else [model, reference]
    paired, images = comparison.per_prompt(compared, scorer)
    if not images:
        return {}
    path_kl = comparison.samples
    for column in MODEL_COLUMNS:
        path_kl = path_kl[path_kl[column] == getattr(model, column)]
    return {
        "scorer": scorer,
        "anchors": line.name,
        "mixture": anchor_name(model.anchor),
        "shares": " ".join(f"{share:g}" for share in point.shares),
        **model._asdict(),
        "prompts": len(paired),
        "images": images,
        "mean": mean_of(paired),
        "gain": NO_ESTIMATE if reference is None else gain_of(paired),
        "path_kl": path_kl["path_kl"].mean(),
        **_beside_target(comparison, point.cell, scorer),
    }


def _beside_target(comparison: Comparison, cell: Cell | None, scorer: str) -> Row:
    """How far a mixture is from the model that was aligned on the mixed reward."""
    empty: Row = {
        "target": None,
        "target_mean": NO_ESTIMATE,
        "target_gain": NO_ESTIMATE,
        "error": NO_ESTIMATE,
        "share": NO_ESTIMATE,
        "clear": False,
        "second_seed": NO_ESTIMATE,
    }
    if cell is None:
        return empty
    models = [cell.realigned, cell.target, cell.reference]
    paired, images = comparison.per_prompt(models, scorer)
    if not images:
        return empty
    error = approximation_error(*paired.to_numpy().T)
    beside = empty | {
        "target": cell.target.anchor,
        "target_mean": mean_of(paired[[1]]),
        "target_gain": gain_of(paired[[1, 2]]),
        "error": error.error,
        "share": error.share,
        "clear": error.distance_is_clear,
    }
    for other in cell.second_seeds[:1]:
        seeds, _ = comparison.per_prompt([other, cell.target, cell.reference], scorer)
        beside["second_seed"] = approximation_error(*seeds.to_numpy().T).share
    return beside


def mixtures_verdict(data: pd.DataFrame) -> str:
    """How close mixtures land to models aligned on the mixed reward, in a sentence; may be empty.

    Args:
        data: of `mixtures_of_anchors`.
    """
    if not len(data) or data["target"].isna().all():
        return ""
    parts = []
    for scorer, rows in data[data["target"].notna()].groupby("scorer", sort=False):
        clear = rows[rows["clear"]]
        text = f"by {scorer}, {len(clear)} of {len(rows)} have a clear distance"
        if len(clear):
            text += (
                f" and miss their target by {number(clear['share'].mean())} % of it on average "
                f"({number(clear['share'].min())} to {number(clear['share'].max())})"
            )
        parts.append(text)
    count = data[data["target"].notna()]["mixture"].nunique()
    return (
        f"Mixtures: {count} were compared with models aligned from scratch on the mixed reward: "
        f"{'; '.join(parts)}."
    )


def _share(row: Row) -> str:
    if row["target"] is None:
        return NOT_THERE
    return interval(row["share"]) + ("" if row["clear"] else " ?")


COLUMNS = (
    Column("scorer"),
    Column("mixture"),
    LAM,
    Column("mode"),
    SAMPLED,
    Column("mean score", "mean"),
    Column("above the reference", "gain"),
    Column("target's mean", "target_mean"),
    Column("% of distance", text=_share),
    Column("second seed", "second_seed"),
    Column("path KL", "path_kl"),
)
