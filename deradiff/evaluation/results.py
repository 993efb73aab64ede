"""From a comparison to everything that is shown, and the files that hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.figures.drawing import FORMATS, Drawing
from deradiff.evaluation.figures.image_grids import ImageGrid, image_grids
from deradiff.evaluation.judging import PAIRWISE
from deradiff.evaluation.registry import draw_figures, make_tables
from deradiff.evaluation.report.report import ScorerLine, render
from deradiff.evaluation.tables.early_stopping import early_stopping_verdict
from deradiff.evaluation.tables.errors import verdict
from deradiff.evaluation.tables.mixtures import mixtures_verdict
from deradiff.evaluation.tables.selection import Answer, select
from deradiff.evaluation.tables.table import ResultTable
from deradiff.files import write_atomic
from deradiff.scorers.spec import ScorerSpec

REPORT = "report.html"


@dataclass(frozen=True)
class Evaluation:
    """Everything that is made from a comparison.

    Attributes:
        comparison: what was compared.
        tables: by name.
        figures: the drawings, by name.
        grids: images for the report.
        answer: which lambda to choose.
        verdicts: the report's first sentences.
    """

    comparison: Comparison
    tables: dict[str, ResultTable]
    figures: dict[str, Drawing]
    grids: list[ImageGrid]
    answer: Answer
    verdicts: list[str]


def evaluate(comparison: Comparison) -> Evaluation:
    """Make every table, figure and sentence of a comparison."""
    tables = make_tables(comparison)
    answer = select(comparison)
    return Evaluation(
        comparison=comparison,
        tables=tables,
        figures=draw_figures(comparison, tables),
        grids=image_grids(comparison.samples),
        answer=answer,
        verdicts=_verdicts(comparison, tables, answer),
    )


def _verdicts(
    comparison: Comparison, tables: Mapping[str, ResultTable], answer: Answer
) -> list[str]:
    """The report's first sentences: which lambda, and how close to models from scratch."""
    sentences = [answer.sentence]
    of_mixtures = mixtures_verdict(tables["mixtures"].data)
    if comparison.cells or not of_mixtures:
        sentences.append(verdict(tables["summary"].data, comparison.missing))
    if of_mixtures:
        sentences.append(of_mixtures)
    of_checkpoints = early_stopping_verdict(tables["early_stopping"].data)
    if of_checkpoints:
        sentences.append(of_checkpoints)
    return sentences


def write(run_dir: Path, evaluation: Evaluation, scorers: Mapping[str, ScorerSpec]) -> Path:
    """Write tables/* (csv, md, tex), plots/* (svg, pdf, png) and report.html.

    A table or figure of an earlier command that this one does not make is removed.

    Args:
        run_dir: where they go.
        evaluation: what is written.
        scorers: by label, for the report's list of how scores were made.

    Returns:
        The report's path.
    """
    # Tables
    for table in evaluation.tables.values():
        table.write(run_dir / "tables")

    # Figures
    plots = run_dir / "plots"
    for ending in FORMATS:
        for old in plots.glob(f"*.{ending}"):
            if old.stem not in evaluation.figures:
                old.unlink()
    for name, drawing in evaluation.figures.items():
        for ending, content in drawing.files.items():
            write_atomic(plots / f"{name}.{ending}", content)

    # The report
    lines = scorer_lines(evaluation.comparison, scorers)
    write_atomic(run_dir / REPORT, render(run_dir.name, evaluation, lines))
    return run_dir / REPORT


def scorer_lines(comparison: Comparison, scorers: Mapping[str, ScorerSpec]) -> Sequence[ScorerLine]:
    """How each scorer's scores were made.

    Args:
        comparison: with the scores.
        scorers: by label.
    """
    first_rows = comparison.scores.drop_duplicates("scorer").set_index("scorer")
    lines = []
    for label, spec in scorers.items():
        row = first_rows.loc[label]
        line = ScorerLine(
            label=label,
            scale=row["scale"],
            version=row["version"],
            checkpoint=_network_of(spec),
            preprocessing=row["preprocessing"],
        )
        lines.append(line)

    # The judge of pairs
    if comparison.judgements is not None and len(comparison.judgements):
        row = comparison.judgements.iloc[0]
        judge = ScorerLine(
            label=PAIRWISE,
            scale=row["scale"],
            version=row["version"],
            checkpoint=row["judge"],
            preprocessing=row["preprocessing"],
        )
        lines.append(judge)
    return lines


def _network_of(spec: ScorerSpec) -> str:
    """Which network a scorer is, for the report."""
    if spec.endpoint is not None:
        return spec.endpoint.model
    return spec.checkpoint or spec.file or "default"
