"""Published prompt sets by name: their captions alone, read from the hub, never the pictures beside them."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deradiff.hub import fetch, listing

TABLES = (".parquet", ".csv", ".tsv")


@dataclass(frozen=True)
class PromptSet:
    """Where a set lies: in the first of `repos` that answers. files: by name, json lists of prompts; else column: of the tables of `split`.

    illustrated: repositories whose tables hold pictures, too, of which the one column is read and nothing downloaded.
    """

    repos: tuple[str, ...]
    files: tuple[str, ...] = ()
    split: str = "train"
    column: str = ""
    illustrated: tuple[str, ...] = ()


SETS = {
    # Pick-a-Pic v1's test_unique, as the paper evaluates it: 500 prompts, in a repository without pictures (150 kB)
    "pickapic": PromptSet(
        ("yuvalkirstain/pickapic_v1_no_images",),
        split="test_unique",
        column="caption",
        illustrated=("yuvalkirstain/pickapic_v1", "pickapic-anonymous/pickapic_v1"),
    ),
    "hpdv2": PromptSet(  # the benchmark's 3200: 800 of each style
        ("zhwang/HPDv2", "ymhao/HPDv2"),
        tuple(
            f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")
        ),
    ),
    "partiprompts": PromptSet(("nateraw/parti-prompts",), column="Prompt"),
    "drawbench": PromptSet(("sayakpaul/drawbench",), column="Prompts"),
}


def captions(name: str) -> list[Any]:
    """The prompts of a set of `SETS`, in its order; from the hub's cache where the hub does not answer.

    Raises ValueError, in one sentence, where no repository gives them: some are gated, and some are reported gone.
    """
    wanted, said = SETS[name], []
    for repo in (*wanted.repos, *wanted.illustrated):
        try:
            return _read(repo, wanted)
        except OSError as error:
            said.append(f"{repo}: {error}")
    raise ValueError(
        f"the prompt set {name} could not be read from the hub ({'; '.join(said)}): save its captions as a text file, a line each, or take "
        "a parquet file with a column caption from a mirror, and give prompts=<that file>"
    )


def _read(repo: str, wanted: PromptSet) -> list[Any]:
    if wanted.files:
        files = [fetch(repo, name, repo_type="dataset") for name in wanted.files]
        return [prompt for file in files for prompt in json.loads(file.read_text(encoding="utf-8"))]
    root, names = listing(repo, repo_type="dataset")
    tables = [name for name in names if name.endswith(TABLES)]
    split = [
        name
        for name in tables
        if Path(name).name.partition(".")[0].partition("-")[0] == wanted.split
    ] or tables
    if (len(tables) > 1 and split == tables) or not tables:
        raise OSError(f"it has no table of the split {wanted.split}")
    if repo in wanted.illustrated:
        return [
            prompt
            for name in sorted(split)
            for prompt in _remote_column(f"datasets/{repo}/{name}", wanted.column)
        ]
    files = [
        Path(root) / name if Path(root).is_dir() else fetch(repo, name, repo_type="dataset")
        for name in sorted(split)
    ]
    return [prompt for file in files for prompt in _column(file, wanted.column)]


def _remote_column(address: str, column: str) -> list[Any]:
    """A column of a parquet file of the hub, by requests for its ranges of bytes."""
    import pyarrow.parquet as pq
    from huggingface_hub import HfFileSystem

    try:
        with HfFileSystem().open(address, block_size=2**16) as opened:
            return pq.read_table(opened, columns=[column])[column].to_pylist()
    except Exception as error:  # of the hub's client, of the network, of the table
        raise OSError(type(error).__name__) from error


def _column(file: Path, column: str) -> list[Any]:
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        if column not in pq.read_schema(file).names:
            raise OSError(f"{file.name} has no column {column}")
        return pq.read_table(file, columns=[column])[column].to_pylist()
    with open(file, encoding="utf-8-sig", newline="") as opened:
        rows = list(csv.DictReader(opened, delimiter="\t" if file.suffix == ".tsv" else ","))
    if not rows or column not in rows[0]:
        raise OSError(f"{file.name} has no column {column}")
    return [row[column] for row in rows]
