"""Scorers that are formulas: the shapes world's true rewards, and one for images of any kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from deradiff.scorers.base import BatchedScorer, digest
from deradiff.scorers.spec import ScorerSpec
from deradiff.worlds.rewards import REWARDS
from deradiff.worlds.shapes import scene_of


class FormulaScorer(BatchedScorer):
    """One of the rewards of `deradiff.worlds.rewards` behind the `Scorer` protocol.

    Its version is the digest of the file that holds the formula.

    Args:
        name: a key of `REWARDS`.
    """

    scale = "reward"
    preprocessing = "RGB; as the reward's formula reads it"

    def __init__(self, name: str) -> None:
        self.name = name
        self.reward = REWARDS[name]
        self.version = digest([Path(self.reward.__code__.co_filename)])

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Rewards (N,)."""
        return self.reward(list(images), list(prompts))


def check(spec: ScorerSpec) -> None:
    """A formula has no file that could be missing."""


def check_prompts(spec: ScorerSpec, prompts: Iterable[str]) -> None:
    """Raises ValueError for a prompt that is no caption of the shapes world."""
    for prompt in dict.fromkeys(prompts):
        try:
            scene_of(prompt)
        except ValueError as error:
            raise ValueError(
                f"the scorer {spec.name} judges by captions of the shapes world, and {error}: in "
                f"place of {spec.name}, name colourful, a formula for images of any kind, or "
                "pickscore, a network from the hub"
            ) from None


def load(spec: ScorerSpec, device: str) -> FormulaScorer:
    """The formula of a spec."""
    return FormulaScorer(spec.name)
