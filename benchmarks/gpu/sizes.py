"""How large the networks and the work of the checks are: as published, or tiny for a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.random_pipelines import PUBLISHED, PipelineSize, TextEncoderSize


@dataclass(frozen=True)
class Work:
    """What is done with one network.

    Attributes:
        pipeline: the size of its networks.
        resolution: pixels of an image's side.
        pairs_per_step: pairs of a micro-batch and of a step.
        steps: of training that are timed, with the first one, which is not.
        checkpointing: train with gradient checkpointing.
    """

    pipeline: PipelineSize
    resolution: int
    pairs_per_step: int
    steps: int
    checkpointing: bool

    @property
    def pairs(self) -> int:
        """Pairs that a training check trains on."""
        return self.pairs_per_step * self.steps


@dataclass(frozen=True)
class Size:
    """The size of everything.

    Attributes:
        works: by network.
        data: pairs of the data set.
        sampler_steps: of an image that is timed.
        few_steps: of one that is compared.
        images: of a large batch.
        matrix: side of the matrices that measure the card.
    """

    works: Mapping[str, Work]
    data: int
    sampler_steps: int
    few_steps: int
    images: int
    matrix: int


def tiny_pipeline(network: str, encoders: int) -> PipelineSize:
    """A pipeline that a CPU samples and trains in a moment.

    Args:
        network: `sd15` or `sdxl`.
        encoders: how many text encoders it has.
    """
    texts = (TextEncoderSize(64, 1),) * encoders
    return PipelineSize(network, texts, width=32, autoencoder=(32,) * 4, shallow=True)


SIZES = {
    "real": Size(
        works={
            "sd15": Work(PUBLISHED["sd15"], 512, 8, 6, checkpointing=False),
            "sdxl": Work(PUBLISHED["sdxl"], 1024, 4, 4, checkpointing=True),
        },
        data=32,
        sampler_steps=10,
        few_steps=4,
        images=4,
        matrix=8192,
    ),
    "tiny": Size(
        works={
            "sd15": Work(tiny_pipeline("sd15", 1), 64, 1, 3, checkpointing=False),
            "sdxl": Work(tiny_pipeline("sdxl", 2), 64, 1, 3, checkpointing=True),
        },
        data=4,
        sampler_steps=2,
        few_steps=2,
        images=2,
        matrix=128,
    ),
}
"""`tiny` runs the same checks on a CPU, and measures nothing that counts."""
