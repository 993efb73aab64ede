"""`python -m eval`: scores, the paper's tables and figures, the choice of lambda, and one report.

Everything that computes is in `deradiff.evaluation`; the stage checks, tracks and prints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from configs.checks import section
from configs.tracking import tracker
from deradiff.anchors.anchor import AnchorCard
from deradiff.evaluation import Comparison, Evaluation, Options, evaluate, read_samples, write
from deradiff.evaluation.asking import JudgeError
from deradiff.evaluation.assessment import Assessors, assess, write_assessment
from deradiff.evaluation.judging import PAIRWISE
from deradiff.evaluation.manifest import read_cards
from deradiff.evaluation.pairing import Pairs, pair_up
from deradiff.evaluation.properties import measure_images
from deradiff.evaluation.results import REPORT
from deradiff.evaluation.shared_work import check_shared_disk, process_state, watch
from deradiff.evaluation.votes import read_votes
from deradiff.files import slug
from deradiff.locks import run_lock
from deradiff.run_directories import claim
from deradiff.scorers import check_spec
from deradiff.scorers.pairwise import load_pairwise_judge
from deradiff.terminal import say
from eval.config import EvalConfig
from eval.tracking import track_results


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
    # Whatever one process refuses, the others hear.
    with watch("eval", "the scores so far are kept"):
        return _run_together(config, run_dir)


def _run_together(config: EvalConfig, run_dir: Path) -> Path:
    """As `run`, in a process of several."""
    # What is evaluated
    specs = {}
    for label, scorer in config.scorers.items():
        key = f"scorers.{label}"
        spec = scorer.spec(key)
        specs[scorer.shown(label)] = spec
        with section(key):
            check_spec(spec)
    pairwise = config.pairwise.spec("pairwise")
    if pairwise is not None:
        with section("pairwise"):
            load_pairwise_judge(pairwise)
    votes = read_votes(config.votes) if config.votes else None
    assessors = Assessors(specs, votes, pairwise)
    samples = read_samples(config.samples, config.references)
    assessors.check_prompts(samples["prompt"])
    cards = read_cards(samples)
    pairs = pair_up(samples, cards)
    state = process_state()
    check_shared_disk(run_dir, state)
    is_main = state.is_main_process
    with run_lock(run_dir, is_main):
        if is_main:
            claim(run_dir, asdict(config), ignore=config.derived())
        evaluation = _evaluate(config, run_dir, assessors, samples, cards, pairs)

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
    assessors: Assessors,
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
        chosen = str(config.select.score)
        score = config.scorers[chosen].shown(chosen)
        with _keys_in_messages():
            cells = [*pairs.cells, *pairs.mixtures]
            assessment = assess(samples, cells, assessors, config.batch_size, cache, _say)
        properties = measure_images(samples, assessors.scorers, score, config.batch_size, cache)
        if assessment is None or properties is None:
            return None
        write_assessment(run_dir, assessment)
        if properties.missing:
            _say(properties.missing)

        # Compare
        options = Options(config.margin, config.threshold, score, config.select.path_kl)
        comparison = Comparison(
            samples=samples,
            scores=assessment.scores,
            cells=pairs.cells,
            missing=pairs.missing,
            cards=cards,
            scorers=list(assessors.scorers),
            options=options,
            mixtures=pairs.mixtures,
            properties=properties,
            votes=assessment.votes,
            judgements=assessment.judgements,
        )
        evaluation = evaluate(comparison)
        write(run_dir, evaluation, assessors.scorers)
        track_results(track, run_dir, evaluation)
    return evaluation


def _say(sentence: str) -> None:
    say(f"eval: {sentence}")


@contextmanager
def _keys_in_messages() -> Iterator[None]:
    """Name keys of the command line in what a judge could not be asked."""
    try:
        yield
    except JudgeError as error:
        key = error.label if error.label == PAIRWISE else f"scorers.{error.label}"
        with section(key):
            raise ValueError(f"{key}: {error}") from error
