"""report.html: one file that needs no network, for a person to read."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from deradiff.evaluation.pairing import GROUP
from deradiff.evaluation.tables.errors import RANGES
from deradiff.evaluation.tables.table import Table, interval


def verdict(summary: pd.DataFrame, missing: list[str]) -> str:
    """How close realigned models come: in a sentence, with its intervals, how far off doing nothing is, and what may not be claimed."""
    if summary.empty:
        why = f" ({missing[0]})" if missing else ""
        return f"Nothing to compare yet: no realigned model has its target, aligned from scratch, among the samples{why}."
    name = next(r for r in RANGES if (summary["range"] == r).any())
    mode = "exact" if (summary["mode"] == "exact").any() else summary["mode"].iloc[0]
    rows = summary[(summary["range"] == name) & (summary["mode"] == mode)]
    own, idle = rows[rows["what"] == "realigned"], rows[rows["what"] == "anchor as is"]
    clear = own["share"].notna().any()
    column = "share" if clear else "percent_of_mean"
    unit = "of the way from the reference to it" if clear else "of its mean score"
    text = f"For {name}, a realigned model misses the model aligned from scratch by {_span(own, column)} {unit}"
    text += (
        f"; the anchor left as it is would miss by {_span(idle, column)}."
        if idle[column].notna().any()
        else "."
    )
    floored, under = int(own["cells_with_floor"].sum()), int(own["cells_under_floor"].sum())
    if floored:
        return f"{text} {under} of {floored} errors lie under the seed floor, the difference that a second training seed makes."
    return f"{text} No second training seed of a target was given, so how much of this is training noise is not known."


def _span(rows: pd.DataFrame, column: str) -> str:
    """The least and the most of a column over scorers, each with its interval and how many pairs of anchor and target it is the mean of."""
    rows = rows[rows[column].notna()].sort_values(column)
    ends = rows.iloc[[0, -1]] if len(rows) > 1 else rows
    return " to ".join(
        f"{interval(row, column, ' %')} ({row['scorer']}, {_pairs(row, column)})"
        for row in ends.to_dict("records")
    )


def _pairs(row: dict[str, Any], column: str) -> str:
    count = (
        f"{row['clear_cells']} of {row['cells']}"
        if column == "share" and row["clear_cells"] < row["cells"]
        else f"{row['cells']}"
    )
    return f"{count} pair{'s' if row['cells'] > 1 else ''}{' whose distance is clear of 0' if 'of' in count else ''}"


def render(
    title: str,
    samples: pd.DataFrame,
    scorers: list[dict[str, str]],
    tables: dict[str, Table],
    figures: dict[str, str],
    grids: list[dict[str, Any]],
    verdicts: list[str],
    missing: list[str],
) -> str:
    """The report. Prompts, paths and labels are others' text: all of it is escaped; only our own SVG and script go in as markup, and the
    page's content security policy lets no other script run."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    options: dict[str, Any] = {
        "undefined": jinja2.StrictUndefined,
        "trim_blocks": True,
        "lstrip_blocks": True,
    }
    environment = jinja2.Environment(loader=folder, autoescape=True, **options)
    script = environment.get_template("report.js.j2").render()
    return environment.get_template("report.html.j2").render(
        title=title,
        verdicts=verdicts,
        counts={
            "models": len(samples.drop_duplicates(GROUP)),
            "images": len(samples),
            "prompts": samples["prompt_id"].nunique(),
        },
        grids=[grid for grid in grids if grid["lines"]],
        figures={name: Markup(svg) for name, svg in figures.items()},
        tables=tables,
        missing=missing,
        scorers=scorers,
        script=Markup(script),
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
