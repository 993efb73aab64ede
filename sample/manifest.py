"""manifest.jsonl: a line an image, written so that neither a kill nor several processes lose one.

What a line holds is `deradiff.evaluation.manifest.ImageRecord`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from deradiff.digests import sealed
from deradiff.evaluation.manifest import MANIFEST, parse_line
from deradiff.files import append_line, write_atomic
from deradiff.terminal import warn

Record = dict[str, Any]

Lams = tuple[float, ...]
"""Lambda of each anchor of a run, mostly of one."""


def image_path(lams: Lams, prompt_id: str, seed: int) -> str:
    """The file of one image, relative to the run directory.

    Args:
        lams: lambda of each anchor.
        prompt_id: of the prompt.
        seed: of the image.
    """
    return f"{lam_folder(lams)}/{prompt_id}-s{seed}.png"


def lam_folder(lams: Lams) -> str:
    """The folder of the images of one lambda: two decimals, or as many as tell it from others.

    Args:
        lams: lambda of each anchor.
    """
    numbers = []
    for lam in lams:
        number = f"{lam:.2f}"
        numbers.append(number if float(number) == lam else repr(lam))
    return "lam=" + ",".join(numbers)


def save_image(run_dir: Path, rank: int, png: bytes, record: Record) -> None:
    """Write an image, then its line: a line in the manifest means that the image is complete.

    Each process appends to a part of its own, which `merge` folds into the manifest.

    Args:
        run_dir: the run directory.
        rank: of the process.
        png: the image's file.
        record: the line without the file's digest.
    """
    write_atomic(run_dir / record["image"], png)
    line = sealed(record | {"sha256": hashlib.sha256(png).hexdigest()})
    append_line(run_dir / f"manifest.{rank}.part", json.dumps(line))


def merge(run_dir: Path) -> list[Record]:
    """Fold the parts of all processes, this run's or a killed one's, into manifest.jsonl.

    The newest line of an image counts, and lines without their image are dropped. Only one process
    may do it at a time.

    Returns:
        The manifest's records, by prompt, seed and lambda.
    """
    parts = sorted(run_dir.glob("manifest.*.part"))
    newest: dict[str, Record] = {}
    for file in [run_dir / MANIFEST, *parts]:
        for record in _read(file):
            newest[record["image"]] = record
    records = [record for record in newest.values() if (run_dir / record["image"]).is_file()]
    records.sort(key=_order)
    lines = [json.dumps(sealed(record)) + "\n" for record in records]
    write_atomic(run_dir / MANIFEST, "".join(lines))
    for part in parts:
        part.unlink()
    return records


def intact(run_dir: Path) -> set[str]:
    """The images of the manifest whose file has the bytes that the manifest says."""
    images = set()
    for record in _read(run_dir / MANIFEST):
        if _sha256(run_dir / record["image"]) == record["sha256"]:
            images.add(record["image"])
    return images


def _sha256(file: Path) -> str | None:
    if not file.is_file():
        return None
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _order(record: Record) -> tuple[Any, ...]:
    """Where a record stands in the manifest."""
    return record["prompt_id"], record["seed"], record["lam"], record["image"]


def _read(file: Path) -> list[Record]:
    """The lines of a manifest or a part that are as they were written.

    Another one is named on stderr, and its image is sampled again. A line that a kill has cut
    short is nothing to speak of.
    """
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(parse_line(line.decode(errors="replace")))
        except ValueError as error:
            if number < len(lines):
                warn(f"sample: {file} line {number} {error}; its image is sampled again")
    return records
