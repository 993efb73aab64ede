"""At which timesteps a pair is measured.

Two means over timesteps are wanted of the same evaluations: one with the shares that training draws
them by, for the loss, and one in proportion to the KL of a step, for the whole trajectory. So one
half of the draws is for each, and every draw counts for both, by its weight: at most 2.

Shapes: T timesteps, M draws of a pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deradiff.training.noising import Noising


class TimeDraws(NamedTuple):
    """Timesteps, with their weights.

    Attributes:
        timesteps: (M,), as the denoiser takes them.
        training_weights: (M,), share of a timestep in training over its share here.
        path_weights: (M,), share of a timestep in the path's KL over its share here.
    """

    timesteps: Tensor
    training_weights: Tensor
    path_weights: Tensor


class TimeProposal:
    """The distribution that timesteps are drawn from.

    Args:
        noising: the forward process.
    """

    def __init__(self, noising: Noising) -> None:
        path = noising.kl_weights / noising.kl_weights.sum()
        shares = (noising.shares + path) / 2
        self._timesteps = noising.timesteps
        self._training_weights = noising.shares / shares
        self._path_weights = path / shares
        self._cumulative = shares.cumsum(0)

    def draw(self, count: int, generator: torch.Generator) -> TimeDraws:
        """Draw timesteps, one from each of `count` equal shares of the distribution.

        Args:
            count: M.
            generator: of the random choices.
        """
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        levels = (torch.arange(count) + uniform) / count
        indices = torch.searchsorted(self._cumulative, levels, right=True)
        indices = indices.clamp(max=len(self._cumulative) - 1)
        return TimeDraws(
            self._timesteps[indices], self._training_weights[indices], self._path_weights[indices]
        )
