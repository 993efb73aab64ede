"""`python -m eval`: scores of the images that the sample stage left, the paper's tables, figures, and one report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from configs.entry import entry
from configs.tracking import Tracker, tracker
from deradiff.runs import claim, write_atomic
from eval.config import EvalConfig

if TYPE_CHECKING:
    from eval.tables import Table


def run(config: EvalConfig, run_dir: Path) -> Path:
    """Evaluate sample runs into `run_dir`; the same command resumes. Returns the path of report.html.

    Everything that can be refused is refused before a scorer's weights load. Raises ValueError, in one sentence.
    """
    # torch and pandas load here, after the config has been checked
    import deradiff.scorers
    from eval import errors, figures, report, tables
    from eval.pairing import by_group, pair_up
    from eval.samples import read_cards, read_samples
    from eval.scoring import score_images, settings

    for scorer in config.scorers.values():
        deradiff.scorers.check_scorer(*settings(scorer))
    samples = read_samples(config.samples)
    cards = read_cards(samples)
    cells, missing = pair_up(samples, cards)
    claim(run_dir, asdict(config), ignore=("batch_size", "runs", "name", "tracking"))

    with tracker(config.tracking, "eval", run_dir, asdict(config)) as tracked:
        scores = score_images(samples, config.scorers, config.batch_size, run_dir / "scores.parquet")
        groups, told = by_group(scores), scores.drop_duplicates("scorer").set_index("scorer")
        means = tables.mean_scores(groups, samples, told["scale"].to_dict())
        found = errors.approximation_errors(cells, groups, list(config.scorers))
        summary = errors.summary(found.data, cells, groups)
        made = {t.name: t for t in (summary, found, means, tables.compute(cards), tables.saved(cells, cards))}
        drawn = {
            "score_against_lambda": figures.score_against_lambda(means.data, cells),
            "reward_against_kl": figures.reward_against_kl(means.data),
        }
        plots = {name: svg for name, svg in drawn.items() if svg}
        for table in made.values():
            table.write(run_dir / "tables")
        for name, svg in plots.items():
            write_atomic(run_dir / "plots" / f"{name}.svg", svg)
        scorers = [
            {"label": label, "checkpoint": s.checkpoint or "default"} | told.loc[label].to_dict() for label, s in config.scorers.items()
        ]
        page = report.render(run_dir.name, samples, scorers, made, plots, missing)
        write_atomic(run_dir / "report.html", page)
        _track(tracked, run_dir, made)
    for sentence in missing:
        print(f"eval: missing: {sentence}")
    print(f"eval: {report.verdict(summary.data, missing)}")
    print(f"eval: report at {run_dir / 'report.html'}")
    return run_dir / "report.html"


def _track(tracked: Tracker, run_dir: Path, made: dict[str, Table]) -> None:
    """The summary as numbers, the tables, the figures, and the report with its scores as files."""
    for row in made["summary"].data.to_dict("records"):
        stem = f"{row['range']}/{row['scorer']}/{row['mode']}/{row['what']}"
        tracked.log({f"{stem}/{name}": row[name] for name in ("error", "percent_of_mean", "share")})
    for table in made.values():
        if len(table.data):
            tracked.table(table.name, list(table.shown.columns), table.shown.to_numpy().tolist())
    for plot in sorted((run_dir / "plots").glob("*.svg")):
        tracked.image(plot.stem, plot)
    for file in ("report.html", "scores.parquet"):
        tracked.artifact(f"eval-{Path(file).stem}", "eval", run_dir / file)


main = entry("eval", EvalConfig, run)
