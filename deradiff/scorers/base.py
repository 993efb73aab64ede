"""What every scorer is."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

BATCH = 32
"""Images in one forward; beside ViT-H-14's 4 GB of weights that takes less than one."""


class Scorer(Protocol):
    """A callable that also states what its numbers are, so that no table has to guess.

    Attributes:
        name: as the tables call it.
        version: a digest of what computes the score; two versions are never compared.
        scale: what the number is: `cosine`, `logit-scaled cosine`, `reward`.
        preprocessing: what happens to an image and a prompt first.
    """

    name: str
    version: str
    scale: str
    preprocessing: str

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Score images of any size and mode, each for its own prompt.

        Returns:
            (N,), float32 on the CPU; higher is better.
        """
        ...


class BatchedScorer(ABC):
    """A scorer whose subclass scores RGB images a batch at a time, in `score_batch`."""

    name: str

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Score images, each for its own prompt.

        Returns:
            (N,), float32 on the CPU.

        Raises:
            ValueError: where there is not one prompt for each image.
        """
        if len(images) != len(prompts):
            raise ValueError(
                f"{self.name} scores each image for its own prompt: got {len(images)} images and "
                f"{len(prompts)} prompts"
            )
        scores = []
        # Without TF32 a GPU's scores are the CPU's, to the last digits of float32
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for start in range(0, len(images), BATCH):
                rgb = [image.convert("RGB") for image in images[start : start + BATCH]]
                scores.append(self.score_batch(rgb, prompts[start : start + BATCH]).float().cpu())
        return torch.cat(scores) if scores else torch.empty(0)

    @abstractmethod
    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores (N,) of at most `BATCH` RGB images, on any device."""


def digest(files: Iterable[Path]) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the files' contents, in the order given."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:12]
