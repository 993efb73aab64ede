"""Paths that a user types: one name for one place, and what to type where nothing is there.

It imports nothing heavy: a mistake in a path is answered before torch is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from configs.keys import LIKENESS
from deradiff.assets import locate
from deradiff.command_line import command_of
from deradiff.data.published_prompts import PROMPT_SETS, SHAPES
from deradiff.hub import is_hub_id

ANCHOR = "anchor"
"""The folder of a train run that holds its anchor."""

CARD = "anchor.json"
MANIFEST = "manifest.jsonl"
SCORES = "scores.parquet"
RUN_CONFIG = "config.yaml"

PIPELINE = "a pipeline folder, or a hub id such as org/name"
AUTOENCODER = "an autoencoder's folder, or a hub id such as org/name"
CHECKPOINT = "a folder or file of weights, or a hub id such as org/name"
"""What keys take, for messages."""

SHOWN = 5
"""How many names a message lists."""


def anchor_path(text: str, runs: str) -> str:
    """The one name of an anchor: of a local folder or file; a hub id is its own.

    A train run stands for the anchor in it, and a file of weights for the anchor whose only file
    it is.

    Args:
        text: what the user typed.
        runs: the folder of all runs.
    """
    path = Path(text).expanduser()
    if not path.exists():
        return text.rstrip("/")
    if (path / ANCHOR / CARD).is_file():
        path = path / ANCHOR
    if path.is_file() and (path.parent / CARD).is_file():
        weights = list(path.parent.rglob("*.safetensors"))
        path = path.parent if weights == [path] else path
    return place(path, runs)


def place(path: Path, runs: str) -> str:
    """The one name of a file or folder that exists.

    It is relative to the working folder where it lies there, begins with `runs` where it lies
    there, and is absolute elsewhere. Links are followed, but for one to a file with another ending:
    the hub's cache keeps files under digests.

    Args:
        path: however it is written.
        runs: the folder of all runs.
    """
    real = path.resolve()
    if real.suffix != path.suffix and path.is_file():
        real = path.parent.resolve() / path.name
    if real.is_relative_to(Path.cwd().resolve()):
        return str(real.relative_to(Path.cwd().resolve()))

    # The folder of all runs may be a link to a larger disk.
    real_runs = Path(runs).resolve()
    if real.is_relative_to(real_runs):
        return str(Path(runs) / real.relative_to(real_runs))
    return str(real)


def check_path(key: str, text: str | None, wanted: str, runs: str = "", depth: int = 2) -> None:
    """Refuse a path where nothing is, at once; what may be a hub id is left to the stage.

    Args:
        key: that it was given for.
        text: what the user typed; None: nothing.
        wanted: what the key takes, for the message.
        runs: the folder of all runs, in which no hub id lies.
        depth: the parts that a hub id may have with the folder or file in it; 0: it takes none.

    Raises:
        ValueError: with the nearest path that is there.
    """
    if text is None or Path(locate(text)).exists():
        return
    parts = text.split("/")
    is_run = bool(runs) and text.startswith(f"{runs.rstrip('/')}/")
    if len(parts) <= depth and is_hub_id("/".join(parts[:2])) and not is_run:
        return
    if Path(text).is_symlink():
        raise ValueError(f"{key}={text} is a link to what is not there: give {wanted}")
    raise ValueError(f"{key}={text} is not there{_instead(key, text) or f': give {wanted}'}")


def check_prompts(key: str, text: str) -> None:
    """Refuse prompts that are no published set, where no file is.

    Args:
        key: that they were given for.
        text: what the user typed.

    Raises:
        ValueError: with what to type.
    """
    names = [SHAPES, *PROMPT_SETS]
    near = get_close_matches(text, names, 1, LIKENESS)
    if text in names:
        return
    if near and not Path(text).exists():
        raise ValueError(f"{key}={text} is not there; do you mean {key}={near[0]}?")
    listed = f"\"{key}=['a red fox']\""
    wanted = f"a file, a list of prompts as in {listed}, or one of {', '.join(names)}"
    check_path(key, text, wanted, depth=0)


def _instead(key: str, text: str) -> str:
    """The end of a message: a path like one that is not there, or else what is beside it."""
    # Part by part, from the first folder that exists
    path = Path("/") if text.startswith("/") else Path()
    parts = [part for part in Path(text).parts if part != "/"]
    for number, part in enumerate(parts):
        if (path / part).exists():
            path = path / part
            continue
        names = _names_in(path)
        near = get_close_matches(part, names, 1, LIKENESS)
        if near:
            path = path / near[0]
            continue
        is_known = number > 0 and bool(names)
        return f"; in {path} there are {_listed(names)}" if is_known else ""
    return f"; do you mean {key}={path}?"


def _names_in(folder: Path) -> list[str]:
    """The names in a folder, without hidden ones; none of a file."""
    if not folder.is_dir():
        return []
    return sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))


def _listed(names: list[str]) -> str:
    """Some of a list of names, for a message."""
    more = ", ..." if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_anchor(text: str, runs: str) -> None:
    """Refuse an anchor where nothing is, and the folder of another stage.

    Args:
        text: an anchor by its one name.
        runs: the folder of all runs.

    Raises:
        ValueError: with what to type.
    """
    path = Path(text)
    if path.name == ANCHOR and (path.parent / RUN_CONFIG).is_file() and not path.exists():
        path = path.parent
    if (path / MANIFEST).is_file():
        raise ValueError(
            f"anchor={text} is a folder of samples: give the anchor that they are of, "
            f"anchor={_anchor_of(path)}"
        )
    if (path / SCORES).is_file():
        raise ValueError(f"anchor={text} is an evaluation: give {_anchor_example(runs)}")
    if (path / RUN_CONFIG).is_file() and not (path / ANCHOR).exists():
        raise ValueError(
            f"anchor={text} holds no anchor yet: run its {command_of('train')} command to its end"
        )
    inside = [one for one in _folders_in(path) if (one / ANCHOR / CARD).is_file()]
    if inside:
        names = [str(one) for one in inside]
        raise ValueError(f"anchor={text} holds several runs: give one, as in anchor={names[0]}")
    check_path("anchor", text, "a folder or LoRA file that exists, or a hub id", runs, depth=99)


def _anchor_example(runs: str) -> str:
    """How an anchor is typed: one of the runs where there is one."""
    for folder in _folders_in(Path(runs) / "train"):
        if (folder / ANCHOR / CARD).is_file():
            return f"anchor={folder / ANCHOR}"
    return f"anchor={runs}/train/<name>/anchor"


def _folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, by name."""
    if not folder.is_dir():
        return []
    return sorted(one for one in folder.iterdir() if one.is_dir())


def check_samples(key: str, text: str, runs: str) -> None:
    """Refuse samples where nothing is, and the folder of another stage.

    Args:
        key: `samples` or `references`.
        text: a run of the sample stage by its one name.
        runs: the folder of all runs.

    Raises:
        ValueError: with what to type.
    """
    path = Path(text)
    if (path / MANIFEST).is_file():
        return
    if path.name == MANIFEST:
        raise ValueError(f"{key}: {text} is a file in a run: give '{key}=[{path.parent}]'")
    is_anchor = (path / CARD).is_file() or (path / ANCHOR / CARD).is_file()
    if is_anchor:
        anchor = anchor_path(text, runs)
        sampled = [str(one) for one in _samples_in(Path(runs)) if _anchor_of(one) == anchor]
        remedy = f"sample it first, {command_of('sample')} anchor={anchor}"
        if sampled:
            remedy = f"give its samples, '{key}=[{','.join(sampled)}]'"
        raise ValueError(f"{key}: {text} is an anchor: {remedy}")
    if (path / SCORES).is_file():
        raise ValueError(f"{key}: {text} is an evaluation: give the runs/sample/... it was made of")
    inside = [str(one) for one in _folders_in(path) if (one / MANIFEST).is_file()]
    if inside:
        raise ValueError(f"{key}: {text} holds several runs: give '{key}=[{','.join(inside)}]'")
    if not path.exists():
        example = f"'{key}=[{runs}/sample/<name>]'"
        wanted = f"a folder that {command_of('sample')} wrote, as in {example}"
        near = _instead(key, text).replace(f"{key}=", "")
        raise ValueError(f"{key}: {text} is not there{near or f': give {wanted}'}")


def _samples_in(runs: Path) -> Iterator[Path]:
    """The runs of the sample stage."""
    for folder in _folders_in(runs / "sample"):
        if (folder / MANIFEST).is_file():
            yield folder


def _anchor_of(samples: Path) -> str:
    """The anchor of a run of samples, by its first line; "..." where it says none."""
    with open(samples / MANIFEST, encoding="utf-8") as lines:
        first = lines.readline()
    try:
        return str(json.loads(first)["anchor"])
    except (ValueError, KeyError, TypeError):
        return "..."
