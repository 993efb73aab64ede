"""Several scorers as one: the sum of their scores, each times its weight."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from deradiff.scorers import load_scorer


class WeightedSum:
    """A scorer whose score is sum_i w_i s_i, with each s_i in its own scorer's unit.

    Its version is the digest of the weights and of the scorers' versions.

    Args:
        weights: by the names of the scorers, which are keys of `deradiff.scorers.SCORERS`.
        device: of their networks.

    Raises:
        ValueError: as `load_scorer`.
    """

    scale = "weighted sum"

    def __init__(self, weights: Mapping[str, float], device: str = "cpu") -> None:
        self.weights = dict(weights)
        self.scorers = {name: load_scorer(name, device=device) for name in weights}
        terms = []
        versions = []
        for name, weight in self.weights.items():
            terms.append(f"{weight!r} {name}")
            versions.append(f"{weight!r} {self.scorers[name].version}")
        self.name = " + ".join(terms)
        self.version = hashlib.sha256("\n".join(versions).encode()).hexdigest()[:12]
        self.preprocessing = "; ".join(
            f"{name}: {scorer.preprocessing}" for name, scorer in self.scorers.items()
        )

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Score images, each for its own prompt.

        Returns:
            (N,), float32 on the CPU.
        """
        total = torch.zeros(len(images))
        for name, scorer in self.scorers.items():
            total += self.weights[name] * scorer(images, prompts)
        return total
