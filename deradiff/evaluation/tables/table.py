"""The tables: numbers as csv, and the same for people as markdown and in the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import ANCHOR, GROUP, Group, per_prompt, short
from deradiff.evaluation.statistics import Estimate, paired_bootstrap
from deradiff.files import write_atomic


@dataclass
class Table:
    """data: one value a cell, for csv. shown: text a cell, for people. note: what the columns mean."""

    name: str
    title: str
    note: str
    data: pd.DataFrame
    shown: pd.DataFrame

    def markdown(self) -> str:
        head = [str(column) for column in self.shown.columns]
        lines = [head, ["---"] * len(head), *self.shown.to_numpy().tolist()]
        rows = [
            "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
            for line in lines
        ]
        return "\n".join([f"## {self.title}", "", *rows, "", self.note, ""])

    def write(self, folder: Path) -> None:
        """`<name>.csv` and `<name>.md`; a table without a row is no file, nor is an earlier one left."""
        for ending, text in (("csv", self.data.to_csv(index=False)), ("md", self.markdown())):
            file = folder / f"{self.name}.{ending}"
            if len(self.data):
                write_atomic(file, text)
            else:
                file.unlink(missing_ok=True)


def table(
    name: str, title: str, note: str, data: pd.DataFrame, shown: list[dict[str, str]]
) -> Table:
    """A table whose columns `mode` and `sampled`, where they say the same on every line, say it once, in the note."""
    text, told = pd.DataFrame(shown), " ".join(note.split())
    for column, words in (("mode", "Realigned in mode {}."), ("sampled", "Sampled with {}.")):
        if column in text.columns and text[column].nunique() == 1:
            told += " " + words.format(text[column].iloc[0])
            text = text.drop(columns=column)
    return Table(name, title, told, data, text)


def spread(name: str, estimate: Estimate) -> dict[str, float]:
    """Three columns: the value, and its interval's ends as `<name>_low`, `<name>_high`."""
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def number(value: float | None) -> str:
    """Three significant digits; a dash for what is not there."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval(row: Any, name: str, unit: str = "") -> str:
    """`value unit [low, high]` of the three columns that `spread` made."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{number(row[name])}{unit}" + (
        f" [{number(low)}, {number(high)}]" if np.isfinite(low) else ""
    )


def bench(row: Any) -> str:
    """How images were sampled, from the columns of SAMPLING_COLUMNS."""
    eta = f" (eta {row['eta']:g})" if row["eta"] else ""
    pixels = f"{row['width']}x{row['height']}"
    return (
        f"{row['sampler']}{eta}, {row['steps']} steps, guidance {row['guidance_scale']:g}, {pixels}"
    )


MEANS = """Means over prompts, each the mean over its seeds. Brackets: 95 % bootstrap intervals over prompts. Above the reference: the
paired difference to lam = 0, so that what prompts differ in cancels. Path KL: in nats, of the realigned chain to the reference chain.
Scales: """


def mean_scores(
    groups: dict[Group, pd.DataFrame], samples: pd.DataFrame, scales: dict[str, str]
) -> Table:
    """Every model's mean score, and how far it lies above the reference's."""
    rows = []
    path_kl = samples.groupby(GROUP)["path_kl"].mean()
    betas = dict(zip(samples["anchor"], samples["beta"]))
    for group, scored in groups.items():
        told = dict(zip(GROUP, group))
        reference = [g for g in groups if g[:ANCHOR] == group[:ANCHOR] and g[-1] == 0]
        reference = sorted(reference, key=lambda g: g[ANCHOR] != group[ANCHOR])[
            :1
        ]  # its own run's where there is one
        for scorer in scored.columns:
            paired, images = per_prompt(groups, [group, *reference], scorer)
            if not images:
                continue
            gain = paired_bootstrap(paired.to_numpy(), lambda m: m[..., 0] - m[..., -1])
            rows.append(
                {"scorer": scorer, "scale": scales[scorer], **told, "beta": betas[told["anchor"]]}
                | {"prompts": len(paired), "images": images}
                | spread("mean", paired_bootstrap(paired.to_numpy(), lambda m: m[..., 0]))
                | spread("gain", gain if reference else Estimate(np.nan, np.nan, np.nan))
                | {"path_kl": path_kl[group]}
            )
    data = pd.DataFrame(rows).sort_values([*SAMPLING_COLUMNS, "beta", "anchor", "mode", "lam"])
    order = data["scorer"].map(list(scales).index)  # as they were typed
    data = data.iloc[order.argsort(kind="stable")].reset_index(drop=True)
    shown = [
        {
            "scorer": r["scorer"],
            "anchor": short(r["anchor"]),
            "beta": number(r["beta"]),
            "lam": number(r["lam"]),
            "mode": r["mode"],
            "sampled": bench(r),
            "images": str(r["images"]),
            "mean score": interval(r, "mean"),
            "above the reference": interval(r, "gain"),
            "path KL": number(r["path_kl"]),
        }
        for r in data.to_dict("records")
    ]
    note = MEANS + "; ".join(f"{scorer} {scale}" for scorer, scale in scales.items()) + "."
    return table("means", "Mean scores", note, data, shown)
