"""Judges of pairs: which of two images of one prompt is better."""

from __future__ import annotations

from typing import Protocol

from PIL import Image

from deradiff.scorers.chat import Clock
from deradiff.scorers.judge import ModelJudge
from deradiff.scorers.rubrics import load_rubric
from deradiff.scorers.spec import PairwiseSpec


class PairwiseJudge(Protocol):
    """Chooses between two images, as a `Scorer` gives a number to one.

    Attributes:
        name: as its folder in the cache is called.
        version: a digest of what decides; two versions are never compared.
        scale: what the answer is.
        preprocessing: what happens to images and prompt first.
    """

    name: str
    version: str
    scale: str
    preprocessing: str

    def prefer(self, first: Image.Image, second: Image.Image, prompt: str) -> float:
        """Which of two images is better for a prompt, seen in this order.

        Returns:
            1 for the first one, 0 for the second one, 0.5 for neither.
        """


class ModelPairwiseJudge(ModelJudge):
    """A model behind a server, as a `PairwiseJudge`. Threads may call it at once."""

    name = "pairwise"
    scale = "preference"

    def prefer(self, first: Image.Image, second: Image.Image, prompt: str) -> float:
        """See `PairwiseJudge.prefer`.

        Raises:
            NoAnswer: where the model gives no answer that can be read.
            ValueError: where the server cannot be asked.
        """
        return self.answer([first, second], prompt)


def load_pairwise_judge(spec: PairwiseSpec, clock: Clock | None = None) -> ModelPairwiseJudge:
    """The judge of a spec.

    Args:
        spec: which model, behind which server.
        clock: of the waiting.

    Raises:
        ValueError: where the API key or the rubric is not there. The server is not asked.
    """
    return ModelPairwiseJudge(spec.endpoint, load_rubric(spec.rubric, images=2), clock)
