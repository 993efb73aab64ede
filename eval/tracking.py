"""What a tracker gets of an evaluation: numbers, curves over lambda, tables, images and files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from configs.tracking import Tracker
from deradiff.anchors.mixtures import anchor_name, parts_of
from deradiff.evaluation import Evaluation
from deradiff.evaluation.results import REPORT
from deradiff.evaluation.scoring import SCORES

SUMMARY_NUMBERS = ("error", "percent_of_mean", "share")
CHOSEN_NUMBERS = ("lam", "mean", "gain", "path_kl")
IMAGE_COLUMNS = ["prompt", "seed", "anchor", "mode", "lam", "beta_target", "path_kl"]


def track_results(track: Tracker, run_dir: Path, evaluation: Evaluation) -> None:
    """Give the tracker everything that an evaluation made.

    Args:
        track: the tracker.
        run_dir: where the evaluation's files are.
        evaluation: the evaluation.
    """
    # Numbers
    track.log(_numbers(evaluation))
    for point in _curves(evaluation.tables["means"].data):
        track.curve("lam", point)

    # Tables
    for table in evaluation.tables.values():
        if not table.is_empty:
            track.table(table.name, list(table.data.columns), _cells(table.data))
    images = _images(evaluation)
    track.table("images", list(images.columns), _cells(images))

    # Figures
    for name, drawing in evaluation.figures.items():
        ending = "svg" if drawing.png is None else "png"
        track.image(name, run_dir / "plots" / f"{name}.{ending}")

    # Files
    for file in (REPORT, SCORES):
        track.artifact(f"eval-{Path(file).stem}", "eval", run_dir / file)


def _numbers(evaluation: Evaluation) -> dict[str, float]:
    """The summary, and the chosen model."""
    numbers: dict[str, float] = {}
    for row in evaluation.tables["summary"].data.to_dict("records"):
        stem = f"{row['range']}/{row['scorer']}/{row['mode']}/{row['what']}"
        numbers |= {f"{stem}/{name}": row[name] for name in SUMMARY_NUMBERS}
    candidates = evaluation.answer.table
    if not candidates.is_empty:
        for row in candidates.data[candidates.data["chosen"]].to_dict("records"):
            numbers |= {f"chosen/{name}": row[name] for name in CHOSEN_NUMBERS}
    return numbers


def _curves(means: pd.DataFrame) -> list[dict[str, float]]:
    """Mean scores and path KL over lambda: for each lambda, a number for each anchor and scorer."""
    points = []
    alone = means[means["anchor"].map(parts_of).isna()]
    for lam, rows in alone.groupby("lam"):
        point = {"lam": float(lam)}
        for row in rows.to_dict("records"):
            line = f"{anchor_name(row['anchor'])} {row['mode']}"
            point[f"score/{row['scorer']}/{line}"] = row["mean"]
            point[f"path_kl/{line}"] = row["path_kl"]
        points.append(point)
    return points


def _images(evaluation: Evaluation) -> pd.DataFrame:
    """The images of the report's first grid, each beside its lambda, path KL and scores."""
    comparison = evaluation.comparison
    files = []
    for grid in evaluation.grids[:1]:
        for line in grid.lines:
            files += [file for file in line.files if file]
    samples = comparison.samples
    shown = samples[samples["file"].isin(files)].drop_duplicates("file")
    scores = comparison.scores.pivot_table(
        index=["run", "image"], columns="scorer", values="score", aggfunc="first"
    )
    table = shown.join(scores[list(comparison.scorers)], on=["run", "image"])
    pictures = table.assign(image=table["file"].map(Path))
    return pictures[["image", *IMAGE_COLUMNS, *comparison.scorers]]


def _cells(table: pd.DataFrame) -> list[list[Any]]:
    """The cells of a table, row by row: numbers are numbers, and what is not there is None."""
    rows = table.astype(object).to_numpy().tolist()
    return [list(map(_cell, row)) for row in rows]


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    is_simple = value is None or isinstance(value, str | int | bool | Path)
    return value if is_simple else str(value)
