"""What every scorer is."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

BATCH = 32
"""Images in one forward; beside ViT-H-14's 4 GB of weights that takes less than one."""


class Stated(Protocol):
    """What states of itself what its numbers are, so that no table has to guess.

    Attributes:
        name: as the tables call it.
        version: a digest of what computes the number; two versions are never compared.
        scale: what the number is: `cosine`, `logit-scaled cosine`, `reward`.
        preprocessing: what happens to an image and a prompt first.
    """

    name: str
    version: str
    scale: str
    preprocessing: str


@dataclass
class Statement:
    """What numbers are that no scorer gives; see `Stated`."""

    name: str
    version: str
    scale: str
    preprocessing: str


class Scorer(Stated, Protocol):
    """A callable that also states what its numbers are."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Score images of any size and mode, each for its own prompt.

        Returns:
            (N,), float32 on the CPU; higher is better.
        """
        ...


class BatchedScorer(ABC):
    """A scorer whose subclass scores RGB images a batch at a time, in `score_batch`."""

    name: str
    version: str
    scale: str
    preprocessing: str

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

        def score(start: int, batch: Sequence[Image.Image]) -> Tensor:
            return self.score_batch(batch, prompts[start : start + BATCH])

        return _in_batches(images, score)

    @abstractmethod
    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores (N,) of at most `BATCH` RGB images, on any device."""


class EmbeddingScorer(BatchedScorer):
    """A scorer whose network gives an image a unit vector, as CLIP's image tower does.

    Its entry in `SCORERS` says so (`embeds_images`).
    """

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """The image embeddings of images of any size and mode.

        Returns:
            Unit vectors (N, D), float32 on the CPU.
        """
        return _in_batches(images, lambda start, batch: self.encode_images(batch))

    @abstractmethod
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, D) of at most `BATCH` RGB images, on any device."""


def _in_batches(
    images: Sequence[Image.Image], compute: Callable[[int, Sequence[Image.Image]], Tensor]
) -> Tensor:
    """What a network gives for images, a batch at a time, as float32 on the CPU.

    Args:
        images: N of any mode.
        compute: from the place of the first image of a batch, and the batch in RGB.

    Returns:
        (N, ...).
    """
    results = []
    # Without TF32 a GPU's numbers are the CPU's, to the last digits of float32
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for start in range(0, len(images), BATCH):
            rgb = [image.convert("RGB") for image in images[start : start + BATCH]]
            results.append(compute(start, rgb).float().cpu())
    return torch.cat(results) if results else torch.empty(0)


def digest(files: Iterable[Path]) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the files' contents, in the order given."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:12]
