"""A table of an evaluation: numbers as csv, and the same as text, for people.

A row is a dictionary of values. An `Estimate` is three columns of the csv (`name`, `name_low`,
`name_high`) and one of the text. Which values are shown, and under which header, is said once, by
the table's columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deradiff.anchors.mixtures import lam_text
from deradiff.evaluation.statistics import Estimate
from deradiff.files import write_atomic
from deradiff.texts import printable

Row = dict[str, Any]
NOT_THERE = "–"
NO_ESTIMATE = Estimate(np.nan, np.nan, np.nan)

LATEX_CHARACTERS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
"""What stands for a character that means something to LaTeX."""

NOTE_SENTENCES = {"mode": "Realigned in mode {}.", "sampled": "Sampled with {}."}
"""Columns that the note replaces, by one sentence, where all lines have the same text in them."""


@dataclass(frozen=True)
class Column:
    """One column for people.

    Attributes:
        header: what stands above it.
        key: the value of a row that it shows; the header where None.
        text: makes a row's text; None: by the kind of the value (`display_value`).
    """

    header: str
    key: str | None = None
    text: Callable[[Row], str] | None = None

    def text_of(self, row: Row) -> str:
        """The text of a row."""
        if self.text:
            return self.text(row)
        return display_value(row.get(self.key or self.header))


@dataclass
class ResultTable:
    """A finished table.

    Attributes:
        name: the name of its files.
        title: the heading above it.
        note: what the columns mean.
        data: numbers, for csv and for further computation; an estimate is three columns.
        display: the same as text, for people.
    """

    name: str
    title: str
    note: str
    data: pd.DataFrame
    display: pd.DataFrame

    @classmethod
    def from_rows(
        cls,
        name: str,
        title: str,
        note: str,
        rows: Sequence[Row],
        columns: Iterable[Column],
        display_rows: Sequence[Row] | None = None,
    ) -> ResultTable:
        """A table of rows.

        Args:
            name: the name of its files.
            title: the heading above it.
            note: what the columns mean.
            rows: values, for csv.
            columns: what people see.
            display_rows: the rows that people see, where they are not `rows`.
        """
        # The text
        if display_rows is None:
            display_rows = rows
        columns = list(columns)
        lines = []
        for row in display_rows:
            lines.append({column.header: column.text_of(row) for column in columns})
        display = pd.DataFrame(lines)

        # What is the same on every line goes into the note
        note = " ".join(note.split())
        for header, sentence in NOTE_SENTENCES.items():
            if header in display.columns and display[header].nunique() == 1:
                note += " " + sentence.format(display[header].iloc[0])
                display = display.drop(columns=header)

        data = pd.DataFrame([flatten(row) for row in rows])
        return cls(name, title, note, data, display)

    @property
    def is_empty(self) -> bool:
        """Whether it has no row."""
        return not len(self.data)

    def markdown(self) -> str:
        """The table as markdown, with its title and note."""
        header = [str(column) for column in self.display.columns]
        lines = [header, ["---"] * len(header), *self.display.to_numpy().tolist()]
        rows = [_markdown_line(cells) for cells in lines]
        return "\n".join([f"## {self.title}", "", *rows, "", self.note, ""])

    def latex(self) -> str:
        """The table as LaTeX for the package booktabs, its title and note as the caption."""
        title = _latex_text(self.title)
        return self.display.map(printable).to_latex(
            index=False,
            escape=True,
            caption=(f"{title}. {_latex_text(self.note)}", title),
            label=f"tab:{self.name}",
            column_format="l" * len(self.display.columns),
        )

    def write(self, folder: Path) -> None:
        """Write `<name>.csv`, `<name>.md` and `<name>.tex`.

        An empty table has no files: those of an earlier command are removed.

        Args:
            folder: where they go.
        """
        forms = {"csv": self._csv, "md": self.markdown, "tex": self.latex}
        for ending, form in forms.items():
            file = folder / f"{self.name}.{ending}"
            if self.is_empty:
                file.unlink(missing_ok=True)
            else:
                write_atomic(file, form())

    def _csv(self) -> str:
        return self.data.to_csv(index=False)


def _markdown_line(cells: Sequence[str]) -> str:
    escaped = [_escaped(cell) for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _escaped(cell: str) -> str:
    return printable(cell.replace("|", "\\|").replace("\n", " ")).replace("<", "&lt;")


def _latex_text(text: str) -> str:
    """A text without the characters that mean something to LaTeX."""
    return "".join(LATEX_CHARACTERS.get(character, character) for character in printable(text))


def flatten(row: Row) -> Row:
    """A row of numbers: an estimate becomes three."""
    values: Row = {}
    for key, value in row.items():
        if isinstance(value, Estimate):
            values[key] = value.value
            values[f"{key}_low"] = value.low
            values[f"{key}_high"] = value.high
        else:
            values[key] = value
    return values


def display_value(value: Any) -> str:
    """A value as people see it."""
    if isinstance(value, Estimate):
        return interval(value)
    if isinstance(value, str):
        return value
    return number(value)


def number(value: float | None) -> str:
    """A number in three significant digits; a dash where there is none."""
    if value is None or not np.isfinite(value):
        return NOT_THERE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval(estimate: Estimate, unit: str = "") -> str:
    """An estimate as text, `value unit [low, high]`; without the brackets where none is known."""
    text = f"{number(estimate.value)}{unit}"
    if not np.isfinite(estimate.low):
        return text
    return f"{text} [{number(estimate.low)}, {number(estimate.high)}]"


def estimate_of(row: Mapping[str, Any], name: str) -> Estimate:
    """The estimate that three columns of a table's data hold.

    Args:
        row: of the data.
        name: of the first column; the others are `<name>_low` and `<name>_high`.
    """
    return Estimate(row[name], row[f"{name}_low"], row[f"{name}_high"])


def describe_sampling(row: Mapping[str, Any]) -> str:
    """How images were sampled, from the values of `SAMPLING_COLUMNS`."""
    eta = f" (eta {row['eta']:g})" if row["eta"] else ""
    guidance = f"guidance {row['guidance_scale']:g}"
    size = f"{row['width']}x{row['height']}"
    return f"{row['sampler']}{eta}, {row['steps']} steps, {guidance}, {size}"


LAM = Column("lam", text=lambda row: lam_text(row["anchor"], row["lam"]))
"""The column of lambda; of a mixture that of each anchor."""

SAMPLED = Column("sampled", text=describe_sampling)
"""The column that says how images were sampled."""
