"""Paths that a user types: one name for one place.

It imports nothing heavy: a mistake in a path is answered before torch is loaded.
"""

from __future__ import annotations

from pathlib import Path

ANCHOR = "anchor"
"""The folder of a train run that holds its anchor."""

CARD = "anchor.json"


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
