"""report.html: one file that needs no network, for a person to read."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from deradiff.evaluation.figures.drawing import Drawing
from deradiff.evaluation.pairing import MODEL_COLUMNS
from deradiff.evaluation.registry import CLOSENESS, FIGURES, SECTIONS, TABLES, WHICH_LAMBDA
from deradiff.evaluation.tables.table import ResultTable

if TYPE_CHECKING:  # results.py makes the report
    from deradiff.evaluation.results import Evaluation


@dataclass(frozen=True)
class ScorerLine:
    """How one scorer's scores were made, for the report.

    Attributes:
        label: the scorer's name in tables.
        scale: what its scores measure.
        version: of its code and files.
        checkpoint: of its network.
        preprocessing: what it does to an image.
    """

    label: str
    scale: str
    version: str
    checkpoint: str
    preprocessing: str


@dataclass(frozen=True)
class ReportTable:
    """A table as the report shows it.

    Attributes:
        table: the table.
        folded: the line to click to see it; None: it is open.
        is_tall: whether it scrolls within a window of its own.
    """

    table: ResultTable
    folded: str | None
    is_tall: bool


@dataclass(frozen=True)
class ReportFigure:
    """A figure as the report shows it.

    Attributes:
        name: the name of its file.
        title: the heading above it.
        caption: what it shows and how to read it.
        svg: the figure.
    """

    name: str
    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Section:
    """A section of the report, with whatever tables and figures there are.

    Attributes:
        title: the heading above it.
        tables: in order.
        figures: in order.
        sentence: what it says where there is no table to show.
        missing: sentences that say what could not be compared.
    """

    title: str
    tables: Sequence[ReportTable]
    figures: Sequence[ReportFigure]
    sentence: str = ""
    missing: Sequence[str] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.tables or self.figures or self.sentence or self.missing)

    @property
    def is_open(self) -> bool:
        """Whether any of its tables stands open."""
        return any(not table.folded for table in self.tables)


NOTHING_COMPARED = (
    "No realigned model could be compared with a model that was aligned from scratch at its target."
)


def render(title: str, evaluation: Evaluation, scorers: Sequence[ScorerLine]) -> str:
    """The report as HTML.

    Prompts, paths and labels are others' text, and all of it is escaped. Only our own SVG and
    script go in as markup, and the page's content security policy lets no other script run.

    Args:
        title: of the page.
        evaluation: what it shows.
        scorers: how the scores were made.
    """
    # Templates, and the only script that the page lets run
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("page.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    samples = evaluation.comparison.samples
    counts = {
        "models": len(samples.drop_duplicates(MODEL_COLUMNS)),
        "images": len(samples),
        "prompts": samples["prompt_id"].nunique(),
        "scorers": len(scorers),
    }
    return environment.get_template("page.html.j2").render(
        title=title,
        verdicts=evaluation.verdicts,
        counts=counts,
        grids=[grid for grid in evaluation.grids if grid.lines],
        sections=sections_of(evaluation),
        scorers=scorers,
        script=Markup(script),
        script_sha256=digest,
    )


def sections_of(evaluation: Evaluation) -> list[Section]:
    """The report's sections, with whatever tables and figures the evaluation has."""
    sections = []
    for key, title in SECTIONS.items():
        section = Section(
            title=title,
            tables=_tables_of(key, evaluation.tables),
            figures=_figures_of(key, evaluation.figures),
            **_sentences(key, evaluation),
        )
        if not section.is_empty:
            sections.append(section)
    return sections


def _tables_of(section: str, tables: Mapping[str, ResultTable]) -> list[ReportTable]:
    """The tables of a section that are not empty."""
    own = []
    for spec in TABLES:
        table = tables.get(spec.name)
        if spec.section == section and table is not None and not table.is_empty:
            own.append(ReportTable(table, spec.folded, spec.is_tall))
    return own


def _figures_of(section: str, figures: Mapping[str, Drawing]) -> list[ReportFigure]:
    """The figures of a section that were drawn."""
    own = []
    for spec in FIGURES:
        if spec.section == section and spec.name in figures:
            drawing = Markup(figures[spec.name].svg)
            own.append(ReportFigure(spec.name, spec.title, spec.caption, drawing))
    return own


def _sentences(section: str, evaluation: Evaluation) -> dict[str, Any]:
    """What a section says where a table is empty, and what could not be compared."""
    if section == CLOSENESS:
        has_cells = not evaluation.tables["summary"].is_empty
        nothing = not has_cells and not evaluation.comparison.mixtures
        return {
            "sentence": NOTHING_COMPARED if nothing else "",
            "missing": evaluation.comparison.missing,
        }
    if section == WHICH_LAMBDA and evaluation.answer.table.is_empty:
        return {"sentence": evaluation.answer.sentence}
    return {}
