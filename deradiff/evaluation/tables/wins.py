"""Win rates: on how many prompts a realigned model scores above the model that it stands for, and above what it was made from."""

from __future__ import annotations

import pandas as pd

from deradiff.evaluation.agreement import win_rate
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import ANCHOR, Cell, Group, per_prompt, short
from deradiff.evaluation.tables.table import Table, bench, interval, number, spread, table

WINS = """In % of the prompts, ties counted half: the realigned model's score (the mean over seeds) is above the other's. Against the
target, 50 % is what an imitation should reach; against the reference, what realignment is worth. Brackets: 95 % intervals over prompts."""


def win_rates(cells: list[Cell], groups: dict[Group, pd.DataFrame], scorers: list[str]) -> Table:
    """A row per scorer and cell: the realigned model against its target, the reference, and the anchor as it is."""
    rows = []
    for scorer in scorers:
        for cell in cells:
            row = {
                "scorer": scorer,
                "anchor": cell.realigned[ANCHOR],
                "lam": cell.lam,
                "beta_target": cell.beta_target,
                "mode": cell.mode,
            }
            row |= dict(zip(SAMPLING_COLUMNS, cell.bench))
            for name, other in (
                ("target", cell.target),
                ("reference", cell.reference),
                ("anchor", cell.anchor),
            ):
                paired, images = (
                    per_prompt(groups, [cell.realigned, other], scorer)
                    if other
                    else (pd.DataFrame(), 0)
                )
                if images:
                    row |= {f"over_{name}_prompts": len(paired)} | spread(
                        f"over_{name}", win_rate(*paired.to_numpy().T)
                    )
            rows.append(row)
    shown = [
        {
            "scorer": row["scorer"],
            "anchor": short(row["anchor"]),
            "lam": number(row["lam"]),
            "target beta": number(row["beta_target"]),
            "mode": row["mode"],
            "sampled": bench(row),
            **{
                f"over the {name}": interval(row, f"over_{name}") if f"over_{name}" in row else "–"
                for name in ("target", "reference", "anchor")
            },
        }
        for row in rows
    ]
    return table("wins", "Win rates", WINS, pd.DataFrame(rows), shown)
