"""Win rates by a judge of pairs: which of two images it prefers, shown in both orders."""

from __future__ import annotations

import pandas as pd

from deradiff.anchors.mixtures import anchor_name
from deradiff.evaluation.agreement import win_share
from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.pairing import MODEL_COLUMNS
from deradiff.evaluation.tables.table import (
    LAM,
    NOT_THERE,
    SAMPLED,
    Column,
    ResultTable,
    Row,
    interval,
    number,
)

TITLE = "Which of two images a judge prefers"

NOTE = """Judged by {judge}. Preferred: in % of the pairs, mean over prompts, the realigned
model's image, beside the other one's of the same prompt and noise. Each pair was shown in both
orders; where the two answers differ, it is a tie, and ties count half. Orders disagree: the share
of such pairs, in %; the more there are, the less this judge sees. Against the reference, 50 % says
that realignment is worth nothing; against the target, it is what an imitation should reach.
Brackets: 95 % intervals over prompts."""


def judged_pairs(comparison: Comparison) -> ResultTable:
    """A row per realigned model and what it was judged against; empty without a judge of pairs."""
    judgements = comparison.judgements
    if judgements is None or not len(judgements):
        return ResultTable.from_rows("judged", TITLE, "", [], COLUMNS)
    rows = []
    for _, pairs in judgements.groupby(["against", *MODEL_COLUMNS], sort=False):
        rows.append(_row(pairs))
    note = NOTE.format(judge=judgements["judge"].iloc[0])
    return ResultTable.from_rows("judged", TITLE, note, rows, COLUMNS)


def _row(pairs: pd.DataFrame) -> Row:
    """The row of the pairs of one model and one other."""
    first = pairs.iloc[0]
    by_prompt = pairs.groupby("prompt_id")
    disagree = pairs["in_order"] != pairs["swapped"]
    return {
        **{name: first[name] for name in MODEL_COLUMNS},
        "beta_target": first["beta_target"],
        "against": first["against"],
        "prompts": by_prompt.ngroups,
        "pairs": len(pairs),
        "preferred": win_share(by_prompt["preference"].mean().to_numpy()),
        "disagree": 100 * disagree.mean(),
    }


def _target_beta(row: Row) -> str:
    return NOT_THERE if pd.isna(row["beta_target"]) else number(row["beta_target"])


COLUMNS = (
    Column("anchor", text=lambda row: anchor_name(row["anchor"])),
    LAM,
    Column("target beta", text=_target_beta),
    Column("mode"),
    SAMPLED,
    Column("against"),
    Column("prompts", text=lambda row: f"{row['prompts']:,}"),
    Column("pairs", text=lambda row: f"{row['pairs']:,}"),
    Column("preferred, %", text=lambda row: interval(row["preferred"])),
    Column("orders disagree, %", "disagree"),
)
