"""`python -m eval`: scores, the paper's tables and figures, the choice of lambda, and one report.

Everything that computes is in `deradiff.evaluation`; the stage checks, tracks and prints.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from configs.checks import section
from configs.tracking import Tracker, tracker
from deradiff.anchors.anchor import AnchorCard
from deradiff.evaluation import Comparison, Evaluation, Options, evaluate, read_samples, write
from deradiff.evaluation.manifest import read_cards
from deradiff.evaluation.pairing import Pairs, pair_up
from deradiff.evaluation.results import REPORT
from deradiff.evaluation.scoring import process_state, score_images, write_scores
from deradiff.files import slug
from deradiff.locks import run_lock
from deradiff.run_directories import claim
from deradiff.scorers import ScorerSpec, check_spec
from deradiff.terminal import say
from eval.config import EvalConfig

DERIVED = ("batch_size", "runs", "name", "tracking", "select", "margin", "threshold")
"""Keys that no score depends on."""

SCORES = "scores.parquet"
SUMMARY_NUMBERS = ("error", "percent_of_mean", "share")
CHOSEN_NUMBERS = ("lam", "mean", "gain", "path_kl")


def run(config: EvalConfig, run_dir: Path) -> Path:
    """Evaluate sample runs; the same command resumes.

    Everything that can be refused is refused before a scorer's weights load. Under torchrun or
    accelerate launch the processes share the images, and the first does the rest.

    Args:
        config: of the run.
        run_dir: where scores, tables, figures and the report go.

    Returns:
        The path of report.html.

    Raises:
        ValueError: in one sentence.
    """
    # What is evaluated
    specs = {}
    for label, scorer in config.scorers.items():
        specs[scorer.shown(label)] = scorer.spec()
        with section(f"scorers.{label}"):
            check_spec(scorer.spec())
    samples = read_samples(config.samples, config.references)
    cards = read_cards(samples)
    pairs = pair_up(samples, cards)
    is_main = process_state().is_main_process
    with run_lock(run_dir, is_main):
        if is_main:
            claim(run_dir, asdict(config), ignore=DERIVED)
        evaluation = _evaluate(config, run_dir, specs, samples, cards, pairs)

    if evaluation is not None:
        for sentence in pairs.missing:
            say(f"eval: missing: {sentence}")
        for sentence in evaluation.verdicts:
            say(f"eval: {sentence}")
        say(f"eval: report at {run_dir / REPORT}")
    return run_dir / REPORT


def _evaluate(
    config: EvalConfig,
    run_dir: Path,
    specs: dict[str, ScorerSpec],
    samples: pd.DataFrame,
    cards: dict[str, AnchorCard],
    pairs: Pairs,
) -> Evaluation | None:
    """Score, compare, write and track; processes other than the main one get None."""
    is_main = process_state().is_main_process
    base_model = samples["base_model"].iloc[0]
    group = slug(base_model) if isinstance(base_model, str) else ""
    with tracker(config.tracking, "eval", run_dir, asdict(config), is_main, group) as track:
        for sampled in [*config.samples, *config.references]:
            track.uses(f"samples-{Path(sampled).name}", "samples")

        # Score
        cache = Path(config.runs) / "cache" / "scores"
        scores = score_images(samples, specs, config.batch_size, cache)
        if scores is None:
            return None
        write_scores(scores, run_dir / SCORES)

        # Compare
        chosen = str(config.select.score)
        score = config.scorers[chosen].shown(chosen)
        options = Options(config.margin, config.threshold, score, config.select.path_kl)
        comparison = Comparison(
            samples=samples,
            scores=scores,
            cells=pairs.cells,
            missing=pairs.missing,
            cards=cards,
            scorers=list(specs),
            options=options,
            mixtures=pairs.mixtures,
        )
        evaluation = evaluate(comparison)
        write(run_dir, evaluation, specs)
        track_results(track, run_dir, evaluation)
    return evaluation


def track_results(track: Tracker, run_dir: Path, evaluation: Evaluation) -> None:
    """Give the tracker the summary as numbers, the tables, figures and images, and the files."""
    # Numbers
    for row in evaluation.tables["summary"].data.to_dict("records"):
        stem = f"{row['range']}/{row['scorer']}/{row['mode']}/{row['what']}"
        track.log({f"{stem}/{name}": row[name] for name in SUMMARY_NUMBERS})
    candidates = evaluation.answer.table
    if not candidates.is_empty:
        chosen = candidates.data[candidates.data["chosen"]]
        for row in chosen.to_dict("records"):
            track.log({f"chosen/{name}": row[name] for name in CHOSEN_NUMBERS})

    # Tables
    for table in evaluation.tables.values():
        if not table.is_empty:
            shown = table.display
            track.table(table.name, list(shown.columns), shown.to_numpy().tolist())

    # Images and figures
    for grid in evaluation.grids[:1]:
        rows: list[list[Any]] = []
        for line in grid.lines:
            cells = [Path(file) if file else "" for file in line.files]
            rows.append([line.prompt, *cells])
        track.table("pictures", ["prompt", *(f"lam={head.lam}" for head in grid.heads)], rows)
    for name, drawing in evaluation.figures.items():
        ending = "svg" if drawing.png is None else "png"
        track.image(name, run_dir / "plots" / f"{name}.{ending}")

    # Files
    for file in (REPORT, SCORES):
        track.artifact(f"eval-{Path(file).stem}", "eval", run_dir / file)
