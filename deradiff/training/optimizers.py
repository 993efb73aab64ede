"""The learning rate of each step, the optimiser, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor
from transformers.optimization import Adafactor

from deradiff.training.options import OPTIMIZERS, TrainingOptions, check_optimizer


def learning_rate_at(step: int, options: TrainingOptions) -> float:
    """The learning rate of a step: linear warm-up, then constant or a cosine to zero.

    Args:
        step: the number of steps done before it.
        options: `learning_rate`, `warmup`, `decay` and `steps` are read.
    """
    # Warm-up begins above 0, and ends with step `warmup`.
    rate = options.learning_rate * min(1.0, (step + 1) / (options.warmup + 1))
    if options.decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / options.steps))
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's compiled step reads this tensor
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def make_optimizer(parameters: list[Tensor], options: TrainingOptions) -> torch.optim.Optimizer:
    """The optimiser of a run.

    AdamW has its usual betas (.9, .999), in full precision or with 8-bit moments; Adafactor is set
    as the SDXL recipe of DiffusionDPO sets it.

    Raises:
        ValueError: for an unknown optimiser, and where its package is not installed.
    """
    check_optimizer(options.optimizer)
    common = {"lr": options.learning_rate, "weight_decay": options.weight_decay}

    # Adafactor would otherwise scale the learning rate, and choose it by itself.
    if options.optimizer == "adafactor":
        return Adafactor(
            parameters,
            scale_parameter=False,
            relative_step=False,
            clip_threshold=1.0,
            **common,
        )

    # AdamW: torch's, or that of the package with 8-bit moments.
    adamw: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    package = OPTIMIZERS[options.optimizer]
    if package is not None:
        adamw = import_module(f"{package}.optim").AdamW8bit
    return adamw(parameters, **common)


class Average:
    """Exponential moving average of the trained weights.

    The decay of a step is min(decay, (1 + step) / (10 + step)), so that the first steps are
    forgotten sooner.

    Args:
        trained: the trained weights by name; they are copied.
        decay: of a step, once the average is warm.

    Attributes:
        weights: the average of each weight.
    """

    def __init__(self, trained: dict[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.weights = {name: tensor.detach().clone() for name, tensor in trained.items()}

    @torch.no_grad()
    def update(self, trained: dict[str, Tensor], step: int) -> None:
        """Take in the weights after a step; step: the number of steps done, this one included."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in trained.items():
            self.weights[name].lerp_(tensor, 1 - keep)
