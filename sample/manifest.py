"""manifest.jsonl: a line an image, written so that a killed run, and several processes at once, lose none."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from deradiff.files import write_atomic

Record = dict[str, Any]
MANIFEST = "manifest.jsonl"


def image_path(lam: float, prompt_id: str, seed: int) -> str:
    """Of one image, relative to the run directory. Two decimals of lambda, or as many as tell it from every other."""
    two = f"{lam:.2f}"
    return f"lam={two if float(two) == lam else repr(lam)}/{prompt_id}-s{seed}.png"


def save_image(run_dir: Path, rank: int, png: bytes, record: Record) -> None:
    """Write an image, then its line: a line in the manifest means that the image is there in full.

    Each process appends to a part of its own, which `merge` folds into the manifest.
    """
    write_atomic(run_dir / record["image"], png)
    line = json.dumps(record | {"sha256": hashlib.sha256(png).hexdigest()})
    with open(run_dir / f"manifest.{rank}.part", "a") as part:
        part.write(line + "\n")
        part.flush()
        os.fsync(part.fileno())


def merge(run_dir: Path) -> list[Record]:
    """Fold the parts of all processes, this run's or a killed one's, into manifest.jsonl; returns its records.

    The newest line of an image counts, and lines without their image are dropped. For one process at a time.
    """
    parts = sorted(run_dir.glob("manifest.*.part"))
    newest = {
        record["image"]: record for file in [run_dir / MANIFEST, *parts] for record in _read(file)
    }
    records = sorted(
        (r for r in newest.values() if (run_dir / r["image"]).is_file()),
        key=lambda r: (r["prompt_id"], r["seed"], r["lam"]),
    )
    write_atomic(run_dir / MANIFEST, "".join(json.dumps(record) + "\n" for record in records))
    for part in parts:
        part.unlink()
    return records


def intact(run_dir: Path) -> set[str]:
    """The images of the manifest whose file has the bytes that the manifest says."""
    return {
        r["image"]
        for r in _read(run_dir / MANIFEST)
        if _sha256(run_dir / r["image"]) == r["sha256"]
    }


def _sha256(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _read(file: Path) -> list[Record]:
    lines = file.read_text().split("\n") if file.is_file() else [""]
    *whole, rest = (
        lines  # a line counts when its end was written: what a kill cut short is sampled again
    )
    del rest
    return [json.loads(line) for line in whole]
