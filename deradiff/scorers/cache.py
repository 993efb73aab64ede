"""Scores that were computed before, by image, prompt and scorer.

They lie in files to which any number of processes may add at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from deradiff.files import append_line, slug, write_atomic
from deradiff.scorers.base import Stated, digest

ScoreKey = tuple[str, str]
"""What a score depends on besides the scorer: the SHA-256 of the image's file, and that of its
prompt."""

STATED = ("name", "version", "scale", "preprocessing")
"""What a scorer states of itself; a score belongs to all of it."""


def score_key(sha256: str, prompt: str) -> ScoreKey:
    """The key under which a score is kept.

    Args:
        sha256: of the image's file.
        prompt: for which the image is scored.
    """
    return sha256, hashlib.sha256(prompt.encode()).hexdigest()


@cache
def _source_digest() -> str:
    """A digest of the code that scores: after a correction of it, no older score is used."""
    return digest(sorted(Path(__file__).parent.glob("*.py")))


class ScoreCache:
    """The scores of one scorer.

    Each scorer has a folder, named by all that it states of itself and by the code that scores. In
    it every process appends to a file of its own, one line `[image, prompt, score]` a score. So no
    two processes write to one file, and a kill costs at most the line that was being written.

    Args:
        root: the folder of all scorers.
        scorer: whose scores are kept.

    Attributes:
        folder: of this scorer.
        file: of this process.
        scores: by key, as far as they were read or added.
    """

    def __init__(self, root: Path, scorer: Stated) -> None:
        statement = {name: getattr(scorer, name) for name in STATED}
        statement["source"] = _source_digest()
        text = json.dumps(statement, sort_keys=True, indent=1)
        statement_digest = hashlib.sha256(text.encode()).hexdigest()[:12]

        self.folder = root / f"{slug(scorer.name)}-{statement_digest}"
        self.file = self.folder / f"{uuid.uuid4().hex}.jsonl"
        self.scores: dict[ScoreKey, float] = {}
        if not (self.folder / "scorer.json").is_file():
            write_atomic(self.folder / "scorer.json", text)
        self.read()

    def read(self) -> None:
        """Read what all processes have written.

        A line that is cut off, or holds no finite score, is skipped.
        """
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                entry = _parse(line)
                if entry is not None:
                    key, score = entry
                    self.scores[key] = score

    def add(self, keys: Iterable[ScoreKey], scores: Iterable[float]) -> None:
        """Keep scores; when this returns, a kill no longer loses them.

        Args:
            keys: one for each score.
            scores: as many.
        """
        new_scores = dict(zip(keys, scores, strict=True))
        self.scores |= new_scores
        lines = []
        for key, score in new_scores.items():
            lines.append(json.dumps([*key, score, _checksum(key, score)]))
        append_line(self.file, "\n".join(lines))


def _checksum(key: ScoreKey, score: float) -> int:
    return zlib.crc32(json.dumps([*key, score]).encode())


def _parse(line: bytes) -> tuple[ScoreKey, float] | None:
    """The key and the score of a line; None for one that is not as it was written."""
    try:
        image, prompt, score, checksum = json.loads(line)
        is_whole = math.isfinite(score) and checksum == _checksum((image, prompt), score)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    return ((image, prompt), float(score)) if is_whole else None
