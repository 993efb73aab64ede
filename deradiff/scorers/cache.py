"""Scores that were computed before, by picture, prompt and scorer, in files that any number of
processes may add to at once."""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from deradiff.files import slug, write_atomic
from deradiff.scorers.base import Scorer, digest

Key = tuple[
    str, str
    # what a score depends on besides the scorer: the SHA-256 of the picture's file, and that of its
    # prompt
]


def key(sha256: str, prompt: str) -> Key:
    """What a score is found by: the image file's sha256 and the prompt's."""
    return sha256, hashlib.sha256(prompt.encode()).hexdigest()


@cache
def _source() -> str:
    """A digest of the code that scores, so that a correction of it never meets the scores of
    before."""
    return digest(sorted(Path(__file__).parent.glob("*.py")))


class ScoreCache:
    """The scores of one scorer below `root`: `scores` by key, as `read` found them and `add` added
    them.

    A folder for each scorer, named by all that it says of itself and by the code; in it every
    process appends to a file of its own, a line `[picture, prompt, score]` a score, so that no two
    writers meet and a kill costs at most the line that was being written.
    """

    def __init__(self, root: Path, scorer: Scorer) -> None:
        told = {
            name: getattr(scorer, name) for name in ("name", "version", "scale", "preprocessing")
        } | {"source": _source()}
        text = json.dumps(told, sort_keys=True, indent=1)
        self.folder = root / f"{slug(scorer.name)}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self.file = self.folder / f"{uuid.uuid4().hex}.jsonl"
        self.scores: dict[Key, float] = {}
        if not (self.folder / "scorer.json").is_file():
            write_atomic(self.folder / "scorer.json", text)
        self.read()

    def read(self) -> None:
        """Take in what other processes have written. A line that is not whole, or no finite score,
        counts as not there."""
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    picture, prompt, score = json.loads(line)
                    whole = (
                        isinstance(picture, str)
                        and isinstance(prompt, str)
                        and math.isfinite(score)
                    )
                except (ValueError, TypeError):
                    continue
                if whole:
                    self.scores[picture, prompt] = float(score)

    def add(self, keys: Iterable[Key], scores: Iterable[float]) -> None:
        """Keep scores; when this returns, a kill no longer loses them."""
        fresh = dict(zip(keys, scores, strict=True))
        self.scores |= fresh
        with open(self.file, "a", encoding="ascii") as file:
            file.writelines(json.dumps([*k, score]) + "\n" for k, score in fresh.items())
