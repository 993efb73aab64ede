"""Prompts from where users keep them, each with an id that can name a file."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deradiff.data.prompt_sets import SETS, captions
from deradiff.files import UNSAFE

COLUMNS = ("prompt", "caption")
SOURCES = (
    "a text file with a prompt a line, a .jsonl or .parquet file with a column prompt or caption, a list such as ['a red fox'], or one of "
    f"shapes, {', '.join(SETS)}"
)


@dataclass(frozen=True)
class Prompt:
    """prompt_id: file-system safe, a function of the text alone; where a text comes again, of how often it came before, too."""

    prompt_id: str
    text: str


def load_prompts(source: str | Sequence[str], limit: int | None = None) -> list[Prompt]:
    """The prompts of a source, in its order: `SOURCES` says what it may be; `shapes` are the captions that the shapes world holds out.

    limit: at most so many, evenly spaced over the source, whose neighbours are often of one kind; an id does not depend on it.
    Raises ValueError for a source that is none, is empty, or holds a blank prompt.
    """
    texts = _texts(source)
    where = f"the prompt list {source}" if isinstance(source, str) else "the list of prompts"
    if not texts:
        raise ValueError(f"{where} is empty; give prompts={SOURCES}")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"prompt {number} of {where} is {text!r}; every prompt needs words, so remove it or write some"
            )
    seen: Counter[str] = Counter()
    prompts = []
    for text in texts:
        seen[text] += 1
        again = f"-{seen[text]}" if seen[text] > 1 else ""
        prompts.append(Prompt(prompt_id(text) + again, text))
    kept = min(limit or len(prompts), len(prompts))
    return [prompts[i * len(prompts) // kept] for i in range(kept)]


def prompt_id(text: str) -> str:
    """The text's first words as a file name may hold them, and 12 hexadecimal digits of its SHA-256: at most 53 ASCII characters."""
    words = UNSAFE.sub("-", text[:200]).strip("-.")[:40].rstrip("-.")
    return f"{words or 'prompt'}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _texts(source: str | Sequence[str]) -> list[Any]:
    if not isinstance(source, str):
        return list(source)
    if source == "shapes":
        from deradiff.worlds.shapes import held_out_captions

        return list(held_out_captions())
    if source in SETS:
        return captions(source)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"there is no prompt file {source[:200]}; give prompts={SOURCES}")
    if path.suffix == ".parquet":
        return _parquet_column(path)
    lines = (
        path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    )  # not splitlines: U+2028 may stand inside a prompt
    if path.suffix == ".jsonl":
        return [
            _field(line, f"line {number} of {source}") for number, line in enumerate(lines, start=1)
        ]
    return lines if lines != [""] else []


def _field(line: str, where: str) -> Any:
    try:
        record = json.loads(line)
        return next(record[c] for c in COLUMNS if c in record)
    except (ValueError, TypeError, StopIteration):
        raise ValueError(
            f'{where} is no JSON object with a key prompt or caption, such as {{"prompt": "a red fox"}}'
        ) from None


def _parquet_column(path: Path) -> list[Any]:
    import pyarrow.parquet as pq

    names = pq.read_schema(path).names
    column = next((c for c in COLUMNS if c in names), None)
    if column is None:
        raise ValueError(f"{path} has no column prompt or caption; it has {', '.join(names)}")
    return pq.read_table(path, columns=[column])[column].to_pylist()
