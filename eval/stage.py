"""`python -m eval`: scores of the images that the sample stage left, the paper's tables, figures, the choice of lambda, and one report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from configs.tracking import tracker
from deradiff.files import claim, slug
from eval.config import EvalConfig

DERIVED = (
    "batch_size",
    "runs",
    "name",
    "tracking",
    "select",
    "margin",
    "threshold",
)  # no score depends on these


def run(config: EvalConfig, run_dir: Path) -> Path:
    """Evaluate sample runs into `run_dir`; the same command resumes. Returns the path of report.html.

    Everything that can be refused is refused before a scorer's weights load. Under torchrun or accelerate launch the ranks share the
    images, and the first does the rest. Raises ValueError, in one sentence.
    """
    # torch and pandas load here, after the config has been checked
    import deradiff.scorers
    from deradiff.evaluation.manifest import read_cards, read_samples
    from deradiff.evaluation.pairing import pair_up
    from deradiff.evaluation.scoring import score_images, settings, state, write_scores
    from eval.evaluation import evaluate, track, write

    for scorer in config.scorers.values():
        deradiff.scorers.check_scorer(*settings(scorer))
    samples = read_samples(config.samples, config.references)
    cards = read_cards(samples)
    cells, missing = pair_up(samples, cards)
    main_process = state().is_main_process
    if main_process:
        claim(run_dir, asdict(config), ignore=DERIVED)
    group = slug(str(samples["base_model"].iloc[0])) if "base_model" in samples else ""
    with tracker(config.tracking, "eval", run_dir, asdict(config), main_process, group) as tracked:
        for sampled in [*config.samples, *config.references]:
            tracked.uses(f"samples-{Path(sampled).name}", "samples")
        scores = score_images(
            samples, config.scorers, config.batch_size, Path(config.runs) / "cache" / "scores"
        )
        if scores is None:
            return run_dir / "report.html"
        write_scores(scores, run_dir / "scores.parquet")
        made = evaluate(config, samples, scores, cards, cells, missing)
        write(run_dir, config, samples, scores, made, missing)
        track(tracked, run_dir, made)
    for sentence in missing:
        print(f"eval: missing: {sentence}")
    for sentence in made.verdicts:
        print(f"eval: {sentence}")
    print(f"eval: report at {run_dir / 'report.html'}")
    return run_dir / "report.html"
