"""Published prompt sets by name.

Only their captions are read from the hub, never the images beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import HfFileSystem

from deradiff.data.prompt_files import text_table
from deradiff.data.published_prompts import PROMPT_SETS, PromptSet
from deradiff.hub import fetch, listing
from deradiff.text_files import read_text

TABLE_ENDINGS = (".parquet", ".csv", ".tsv")

REQUEST_BYTES = 2**16
"""Bytes that one request reads of a remote table."""


def load_prompt_set(name: str) -> list[Any]:
    """The prompts of a set, in its order.

    Where the hub does not answer, they are read from the hub's cache.

    Args:
        name: a key of `PROMPT_SETS`.

    Raises:
        ValueError: where no repository can be read. Some need a permission, some were removed.
    """
    prompt_set = PROMPT_SETS[name]
    failures = []
    for repo in (*prompt_set.repos, *prompt_set.repos_with_images):
        try:
            return _read(repo, prompt_set)
        except OSError as error:
            failures.append(f"{repo}: {error}")
    raise ValueError(
        f"the prompt set {name} could not be read from the hub ({'; '.join(failures)}): save its "
        "captions as a text file, one a line, or take a parquet file with a column caption from a "
        "mirror, and give prompts=<that file>"
    )


def _read(repo: str, prompt_set: PromptSet) -> list[Any]:
    """The prompts of a set from one repository. Raises OSError where it does not have them."""
    # From lists of prompts.
    prompts = []
    if prompt_set.files:
        for name in prompt_set.files:
            file = fetch(repo, name, repo_type="dataset")
            prompts += json.loads(file.read_text(encoding="utf-8"))
        return prompts

    # From tables. `root` is a folder of the hub's cache where the hub does not answer.
    root, names = listing(repo, repo_type="dataset")
    for name in sorted(_tables_of_split(names, prompt_set.split)):
        if repo in prompt_set.repos_with_images:
            prompts += _remote_column(f"datasets/{repo}/{name}", prompt_set.column)
        elif Path(root).is_dir():
            prompts += _column(Path(root) / name, prompt_set.column)
        else:
            prompts += _column(fetch(repo, name, repo_type="dataset"), prompt_set.column)
    return prompts


def _tables_of_split(names: list[str], split: str) -> list[str]:
    """The tables of a split among the files of a repository; one table alone is that split."""
    tables = [name for name in names if name.endswith(TABLE_ENDINGS)]
    of_split = [name for name in tables if _split_of(name) == split]
    if of_split:
        return of_split
    if len(tables) == 1:
        return tables
    raise OSError(f"it has no table of the split {split}")


def _split_of(name: str) -> str:
    """`train` of `data/train-00000-of-00001.parquet`."""
    stem = Path(name).name.partition(".")[0]
    return stem.partition("-")[0]


def _remote_column(address: str, column: str) -> list[Any]:
    """A column of a parquet file of the hub; only the bytes of the column are requested."""
    try:
        with HfFileSystem().open(address, block_size=REQUEST_BYTES) as file:
            return pq.read_table(file, columns=[column])[column].to_pylist()
    # An error of the hub's client, of the network, or of the table.
    except Exception as error:
        raise OSError(type(error).__name__) from error


def _column(file: Path, column: str) -> list[Any]:
    """A column of a local table."""
    # Of parquet, only the column is read.
    if file.suffix == ".parquet":
        if column not in pq.read_schema(file).names:
            raise OSError(f"{file.name} has no column {column}")
        return pq.read_table(file, columns=[column])[column].to_pylist()

    # Of a text table, every line.
    names, rows = text_table(read_text(file), file)
    if column not in names:
        raise OSError(f"{file.name} has no column {column}")
    place = names.index(column)
    return [row[place] if place < len(row) else None for row in rows]
