"""What every scorer is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor


class Scorer(Protocol):
    """A callable with four statements about itself, so that no table has to guess what its numbers are.

    name: as the tables call it. version: a digest of what computes the score; two versions are never compared.
    scale: what the number is (`cosine`, `logit-scaled cosine`, `reward`). preprocessing: what happens to a picture and a prompt first.
    """

    name: str
    version: str
    scale: str
    preprocessing: str

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores (N,), float32 on the CPU, of N pictures of any size and mode, each for its own prompt; higher is better."""
        ...


def digest(files: Iterable[Path]) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the files' contents, in the order given."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:12]
