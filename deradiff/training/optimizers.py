"""What training is told (`TrainingOptions`), and what follows from it alone: the rate of a step, the optimiser, the average."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

EIGHT_BIT = {
    "adamw8bit_torchao": ("torchao", "torchao.optim"),
    "adamw8bit_bitsandbytes": ("bitsandbytes", "bitsandbytes.optim"),
}
OPTIMIZERS = ("adamw", "adafactor", *EIGHT_BIT)


@dataclass
class TrainingOptions:
    """steps: optimiser steps in all. batch_size: examples of one forward on one device. learning_rate: the actual one.

    optimizer: of OPTIMIZERS. decay: `constant` or `cosine` (to zero at the last step), after `warmup` linear steps. clip: gradient norm; 0
    leaves gradients alone. ema: decay of an exponential moving average that is saved in place of the weights; 0: none.
    keep_last, keep_best: how many checkpoints stay, the newest and those of the lowest mean loss since the checkpoint before.
    show_every: steps between pictures; 0: none. flops_per_step: useful ones of one optimiser step on all devices; 0: not known.
    """

    steps: int
    batch_size: int
    learning_rate: float
    accumulation: int = 1
    warmup: int = 0
    decay: str = "constant"
    optimizer: str = "adamw"
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema: float = 0.0
    seed: int = 0
    workers: int = 0
    log_every: int = 10
    checkpoint_every: int = 200
    keep_last: int = 2
    keep_best: int = 0
    show_every: int = 0
    flops_per_step: float = 0.0

    @property
    def max_norm(self) -> float:
        """What gradients are clipped to; Adafactor clips its own updates, and clipping twice would change the recipe."""
        return self.clip if self.clip and self.optimizer != "adafactor" else math.inf


def learning_rate_at(step: int, options: TrainingOptions) -> float:
    """Linear warm-up, then constant or a cosine to zero."""
    rate = options.learning_rate * min(1.0, (step + 1) / (options.warmup + 1))
    if options.decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / options.steps))
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's compiled step reads it there
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def check_optimizer(name: str) -> None:
    """Raises ValueError for a name that is none, or whose package is not installed."""
    if name not in OPTIMIZERS:
        raise ValueError(f"the optimiser must be one of {', '.join(OPTIMIZERS)}, not {name!r}")
    if name in EIGHT_BIT and find_spec(EIGHT_BIT[name][0]) is None:
        raise ValueError(
            f"the optimiser {name} needs a package that is not installed: type pip install {EIGHT_BIT[name][0]}"
        )


def make_optimizer(parameters: list[Tensor], options: TrainingOptions) -> torch.optim.Optimizer:
    """AdamW (.9, .999), in full precision or with 8-bit moments, or Adafactor as the SDXL recipe sets it."""
    check_optimizer(options.optimizer)
    if options.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        fixed = {"scale_parameter": False, "relative_step": False, "clip_threshold": 1.0}
        return Adafactor(
            parameters, lr=options.learning_rate, weight_decay=options.weight_decay, **fixed
        )
    adamw: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    if options.optimizer in EIGHT_BIT:
        adamw = import_module(EIGHT_BIT[options.optimizer][1]).AdamW8bit
    return adamw(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)


class Average:
    """Exponential moving average of the trained weights: decay min(ema, (1 + step) / (10 + step)), as Karras et al. warm it up."""

    def __init__(self, trained: dict[str, Tensor], decay: float) -> None:
        self.decay, self.weights = decay, {k: v.detach().clone() for k, v in trained.items()}

    @torch.no_grad()
    def update(self, trained: dict[str, Tensor], step: int) -> None:
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in trained.items():
            self.weights[name].lerp_(tensor, 1 - keep)
