"""Win rates: on how many prompts a realigned model scores above another one."""

from __future__ import annotations

from deradiff.anchors.mixtures import anchor_name
from deradiff.evaluation.agreement import win_rate
from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import Cell
from deradiff.evaluation.tables.table import NOT_THERE, SAMPLED, Column, ResultTable, Row, interval

NOTE = """In % of the prompts, ties counted half: the realigned model's score (the mean over
seeds) is above the other's. Against the target, 50 % is what an imitation should reach; against
the reference, what realignment is worth. Brackets: 95 % intervals over prompts."""

OTHERS = ("target", "reference", "anchor")


def win_rates(comparison: Comparison) -> ResultTable:
    """A row per scorer and cell: the realigned model against target, reference and anchor."""
    rows = []
    for scorer in comparison.scorers:
        rows += [_row(comparison, cell, scorer) for cell in comparison.cells]
    return ResultTable.from_rows("wins", "Win rates", NOTE, rows, COLUMNS)


def _row(comparison: Comparison, cell: Cell, scorer: str) -> Row:
    row: Row = {
        "scorer": scorer,
        "anchor": cell.realigned.anchor,
        "lam": cell.lam,
        "beta_target": cell.beta_target,
        "mode": cell.mode,
        **dict(zip(SAMPLING_COLUMNS, cell.sampling, strict=True)),
    }
    for name in OTHERS:
        other = getattr(cell, name)
        if other is None:
            continue
        paired, images = comparison.per_prompt([cell.realigned, other], scorer)
        if images:
            row[f"over_{name}_prompts"] = len(paired)
            row[f"over_{name}"] = win_rate(*paired.to_numpy().T)
    return row


def _over(name: str) -> Column:
    """The column of the win rate over one of the others."""

    def text(row: Row) -> str:
        key = f"over_{name}"
        return interval(row[key]) if key in row else NOT_THERE

    return Column(f"over the {name}", text=text)


COLUMNS = (
    Column("scorer"),
    Column("anchor", text=lambda row: anchor_name(row["anchor"])),
    Column("lam"),
    Column("target beta", "beta_target"),
    Column("mode"),
    SAMPLED,
    *(_over(name) for name in OTHERS),
)
