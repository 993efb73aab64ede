"""The settings of a training run, and the names that they may have. Light: it imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec

OPTIMIZERS = {  # name: the optional package that it needs, None: none
    "adamw": None,
    "adafactor": None,
    "adamw8bit_torchao": "torchao",
    "adamw8bit_bitsandbytes": "bitsandbytes",
}
LEARNING_RATE_RULES = ("inverse_beta", "fixed")
DECAYS = ("constant", "cosine")


@dataclass
class TrainingOptions:
    """How the training loop trains.

    Attributes:
        steps: optimiser steps in all.
        pairs_per_step: pairs of one optimiser step on all ranks; examples, where there are no
            pairs.
        batch_size: pairs of one forward pass on one rank. How often a rank accumulates gradients
            follows (`deradiff.training.shares.Shares`).
        learning_rate: the rate of a step after warm-up, as the optimiser gets it.
        warmup: steps of linear warm-up.
        decay: a name of DECAYS, after the warm-up; `cosine` ends at zero.
        optimizer: a name of OPTIMIZERS.
        weight_decay: of the optimiser.
        clip: the largest norm of the gradient; 0: no clipping.
        ema: decay of a moving average of the weights, saved in their place; 0: no average.
        workers: processes that load data; 0: the training process loads it.
        log_every: steps between two lines of `metrics.jsonl`.
        checkpoint_every: steps between two checkpoints.
        keep_last: how many of the newest checkpoints stay.
        keep_best: how many checkpoints of the lowest loss stay.
        show_every: steps between two calls of `show`; 0: never.
        flops_per_step: useful FLOPs of one optimiser step on all devices; 0: unknown.
        cuda_graphs: on a GPU, replay forward and backward as CUDA graphs
            (`deradiff.models.cuda_graphs`); under FSDP and DeepSpeed the host calls the operators.
    """

    steps: int
    pairs_per_step: int
    batch_size: int
    learning_rate: float
    warmup: int = 0
    decay: str = "constant"
    optimizer: str = "adamw"
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema: float = 0.0
    workers: int = 0
    log_every: int = 10
    checkpoint_every: int = 200
    keep_last: int = 2
    keep_best: int = 0
    show_every: int = 0
    flops_per_step: float = 0.0
    cuda_graphs: bool = False

    @property
    def max_norm(self) -> float:
        """The norm that gradients are clipped to.

        Infinite for Adafactor, which clips its own updates: clipping twice would be another recipe.
        """
        if self.clip == 0 or self.optimizer == "adafactor":
            return math.inf
        return self.clip


def check_optimizer(name: str) -> None:
    """Check that an optimiser can be used here.

    Raises:
        ValueError: for an unknown name, and where its package is not installed.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"the optimiser must be one of {', '.join(OPTIMIZERS)}, not {name!r}")
    package = OPTIMIZERS[name]
    if package is not None and find_spec(package) is None:
        raise ValueError(
            f"the optimiser {name} needs a package that is not installed: "
            f"type pip install {package}"
        )
