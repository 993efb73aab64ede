"""Prompts in files of the formats that people keep them in."""

from __future__ import annotations

import csv
import io
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from deradiff.text_files import parse_json, read_text

COLUMNS = ("prompt", "caption", "prompts", "captions")
"""Names of a column of prompts, in the order in which they are looked for, in any case."""

FORMATS = (
    "a text file with one prompt a line, or a .jsonl, .json, .yaml, .csv, .tsv or .parquet file "
    "with a column prompt or caption"
)
"""For messages."""

QUOTED = re.compile(r'"((?:[^"]|"")*)"')
"""A field of a .tsv that a program has put in quotes."""


def read_prompt_file(file: Path) -> list[Any]:
    """The prompts in a file, in its order; each is to be checked.

    Args:
        file: of a format that its ending tells, in any case; another ending: one prompt a line.

    Raises:
        ValueError: for a file that is torn, or has no column of prompts.
    """
    ending = file.suffix.lower()
    if ending == ".parquet":
        return _parquet_column(file)
    text = read_text(file)
    if ending in (".jsonl", ".ndjson"):
        return _json_lines(text, file)
    if ending == ".json":
        return _list(parse_json(text, str(file)), file)
    if ending in (".yaml", ".yml"):
        return _list(_parse_yaml(text, file), file)
    if ending in (".csv", ".tsv"):
        names, rows = text_table(text, file)
        place = names.index(_column(names, file))
        return [row[place] if place < len(row) else None for row in rows]
    return _lines(text)


def text_table(text: str, file: Path) -> tuple[list[str], list[list[str]]]:
    """The column names and the rows of a .csv or .tsv.

    Args:
        text: the file's content.
        file: its name.

    Raises:
        ValueError: for a file that is no such table.
    """
    # Between tabs, programs put in quotes what needs it, and people nothing: a prompt may begin
    # with a quoted word.
    if file.suffix.lower() == ".tsv":
        rows = [_fields(line) for line in _lines(text)]
    else:
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        except csv.Error as error:
            raise ValueError(f"{file} is no .csv that can be read: {error}") from error
    rows = [row for row in rows if row]
    return (rows[0], rows[1:]) if rows else ([], [])


def _fields(line: str) -> list[str]:
    """The fields of a line of a .tsv."""
    fields = []
    for field in line.split("\t"):
        quoted = QUOTED.fullmatch(field)
        fields.append(quoted[1].replace('""', '"') if quoted else field)
    return fields


def _lines(text: str) -> list[str]:
    """The lines of a text; `splitlines` would also split at characters such as U+2028."""
    lines = text.removesuffix("\n").split("\n")
    return lines if lines != [""] else []


def _json_lines(text: str, file: Path) -> list[Any]:
    prompts = []
    for number, line in enumerate(_lines(text), start=1):
        if line.strip():
            prompts.append(_prompt_of(_record(line), f"line {number} of {file}"))
    return prompts


def _record(line: str) -> Any:
    """The record of a line; the line itself where it is no JSON."""
    try:
        return parse_json(line, "the line")
    except ValueError:
        return [line]


def _list(content: Any, file: Path) -> list[Any]:
    """The prompts in a document: a list, or one under a usual name."""
    if isinstance(content, dict):
        name = _usual_name(list(content))
        content = content.get(name)
    if not isinstance(content, list):
        raise ValueError(
            f"{file} holds no list of prompts: write one, such as [a red fox, a blue cat], or give "
            f"{FORMATS}"
        )
    prompts = []
    for number, item in enumerate(content, start=1):
        is_record = isinstance(item, dict)
        prompts.append(_prompt_of(item, f"item {number} of {file}") if is_record else item)
    return prompts


def _prompt_of(record: Any, place: str) -> Any:
    """The prompt of a record of a file. Raises ValueError where it has none."""
    if isinstance(record, str):
        return record
    name = _usual_name(list(record)) if isinstance(record, dict) else None
    if name is None:
        raise ValueError(
            f"{place} is {reprlib.repr(record)} and not a JSON object with a key prompt or "
            'caption, such as {"prompt": "a red fox"}'
        )
    return record[name]


def _parse_yaml(text: str, file: Path) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} is no YAML that can be read: {reason}") from error


def _parquet_column(file: Path) -> list[Any]:
    try:
        names = pq.read_schema(file).names
        column = _column(names, file)
        return pq.read_table(file, columns=[column])[column].to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} is no parquet file that can be read: {reason}") from error


def _column(names: Sequence[str], file: Path) -> str:
    """The column of prompts. Raises ValueError where there is none."""
    column = _usual_name(names)
    if column is None:
        shown = reprlib.repr(list(names))
        raise ValueError(f"{file} has no column prompt or caption; it has {shown}")
    if list(names).count(column) > 1:
        raise ValueError(f"{file} has two columns {column}: give one of them another name")
    return column


def _usual_name(names: Sequence[Any]) -> str | None:
    """The first of COLUMNS among some names, as it is written there."""
    written: dict[str, Any] = {}
    for name in names:
        written.setdefault(str(name).strip().lower(), name)
    return next((written[column] for column in COLUMNS if column in written), None)
