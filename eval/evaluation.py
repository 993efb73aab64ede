"""From scores to everything that is shown: tables, figures, pictures, verdicts; and the files and the tracker that get them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from configs.tracking import Tracker
from deradiff.anchors.anchor import AnchorCard
from deradiff.evaluation.figures import error_plots, image_grids, lambda_curves
from deradiff.evaluation.pairing import Cell, Group, by_group
from deradiff.evaluation.report import report
from deradiff.evaluation.tables import costs, errors, paper, wins
from deradiff.evaluation.tables import table as tables
from deradiff.evaluation.tables.selection import Answer, select
from deradiff.evaluation.tables.table import Table
from deradiff.files import write_atomic
from eval.config import EvalConfig


@dataclass(frozen=True)
class Evaluation:
    """tables, plots (svg): by name. grids: pictures for the report. answer: which lambda. verdicts: the report's first sentences."""

    tables: dict[str, Table]
    plots: dict[str, str]
    grids: list[dict[str, Any]]
    answer: Answer
    verdicts: list[str]


def evaluate(
    config: EvalConfig,
    samples: pd.DataFrame,
    scores: pd.DataFrame,
    cards: dict[str, AnchorCard],
    cells: list[Cell],
    missing: list[str],
) -> Evaluation:
    """Everything that the scores say. scores: a row per image and scorer, as `score_images` returns them."""
    groups, scorers = by_group(scores), list(config.scorers)
    scales = scores.drop_duplicates("scorer").set_index("scorer")["scale"]
    means = tables.mean_scores(groups, samples, {scorer: scales[scorer] for scorer in scorers})
    found = errors.approximation_errors(cells, groups, scorers, config.margin)
    summary = errors.summary(found.data, cells, groups, config.margin)
    answer = select(samples, groups, scorers, config.select)
    made = [
        answer.table,
        summary,
        errors.modes(cells, groups, scorers, config.margin, samples),
        paper.paper_errors(summary.data, found.data, cards),
        paper.agreement(found.data, cells, groups, config.threshold),
        paper.by_target(found.data, cards),
        found,
        wins.win_rates(cells, groups, scorers),
        means,
        costs.saved(cells, cards),
        costs.compute(cards),
        costs.published(),
    ]
    by_name, grids = {table.name: table for table in made}, image_grids.grids(samples)
    verdicts = [answer.sentence, report.verdict(summary.data, missing)]
    return Evaluation(
        by_name, draw(config, by_name, samples, cells, groups, grids), grids, answer, verdicts
    )


def draw(
    config: EvalConfig,
    made: dict[str, Table],
    samples: pd.DataFrame,
    cells: list[Cell],
    groups: dict[Group, pd.DataFrame],
    grids: list[dict[str, Any]],
) -> dict[str, str]:
    """Every figure as svg, by name; those that have nothing to show are left out."""
    means, found = made["means"].data, made["approximation"].data
    drawn = {
        "score_against_lambda": lambda_curves.score_against_lambda(means, cells),
        "reward_against_kl": lambda_curves.reward_against_kl(means),
        "reversal": image_grids.reversal(samples, groups, list(config.scorers)),
        "pictures": image_grids.grid_svg(grids[0]),
    }
    if len(found):
        drawn["ecdf"] = error_plots.ecdf(found, cells, groups, config.threshold)
        drawn["scatter"] = error_plots.scatter(found)
        drawn["bland_altman"] = error_plots.bland_altman(found)
    return {name: plot for name, plot in drawn.items() if plot}


def write(
    run_dir: Path,
    config: EvalConfig,
    samples: pd.DataFrame,
    scores: pd.DataFrame,
    made: Evaluation,
    missing: list[str],
) -> None:
    """tables/*.csv and *.md, plots/*.svg, report.html; a table or figure that an earlier command left, and this one has not, goes."""
    for table in made.tables.values():
        table.write(run_dir / "tables")
    for old in (run_dir / "plots").glob("*.svg"):
        if old.stem not in made.plots:
            old.unlink()
    for name, svg in made.plots.items():
        write_atomic(run_dir / "plots" / f"{name}.svg", svg)
    told = scores.drop_duplicates("scorer").set_index("scorer")[
        ["version", "scale", "preprocessing"]
    ]
    scorers = [
        {"label": k, "checkpoint": s.checkpoint or s.file or "default"} | told.loc[k].to_dict()
        for k, s in config.scorers.items()
    ]
    page = report.render(
        run_dir.name, samples, scorers, made.tables, made.plots, made.grids, made.verdicts, missing
    )
    write_atomic(run_dir / "report.html", page)


def track(tracked: Tracker, run_dir: Path, made: Evaluation) -> None:
    """The summary as numbers, the tables, the figures, the pictures, and the report with its scores as files."""
    for row in made.tables["summary"].data.to_dict("records"):
        stem = f"{row['range']}/{row['scorer']}/{row['mode']}/{row['what']}"
        tracked.log({f"{stem}/{name}": row[name] for name in ("error", "percent_of_mean", "share")})
    chosen = made.answer.table.data
    for row in chosen[chosen["chosen"]].to_dict("records") if len(chosen) else []:
        tracked.log({f"chosen/{name}": row[name] for name in ("lam", "mean", "gain", "path_kl")})
    for table in made.tables.values():
        if len(table.data):
            tracked.table(table.name, list(table.shown.columns), table.shown.to_numpy().tolist())
    for grid in made.grids[:1]:
        rows = [
            [line["prompt"], *(Path(file) if file else "" for file in line["files"])]
            for line in grid["lines"]
        ]
        tracked.table(
            "pictures", ["prompt", *(f"lam={head['lam']}" for head in grid["heads"])], rows
        )
    for name in made.plots:
        tracked.image(name, run_dir / "plots" / f"{name}.svg")
    for file in ("report.html", "scores.parquet"):
        tracked.artifact(f"eval-{Path(file).stem}", "eval", run_dir / file)
