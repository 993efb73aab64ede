"""The Diffusion-DPO loss and the conventions of its beta (Wallace et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from deradiff.training.noising import Noising

BETA_CONVENTION = "mean-half"  # beta scales half the difference of errors, each a mean over C, H, W (the published code's)


@dataclass
class DPOTerms:
    """losses: (B,) with gradient. margin: (B,), implicit reward of the winner over the loser.

    error, reference_error: (2, B) mean squared errors of the trained network and the reference, winner first.
    """

    losses: Tensor
    margin: Tensor
    error: Tensor
    reference_error: Tensor

    @property
    def loss(self) -> Tensor:
        """Scalar with gradient: the mean of the logarithms, never the logarithm of a mean."""
        return self.losses.mean()

    @property
    def accuracies(self) -> Tensor:
        """(B,) 1 where the winner is preferred, 0 where the loser is, 1/2 where neither."""
        return (self.margin.sign() + 1) / 2

    @property
    def accuracy(self) -> Tensor:
        return self.accuracies.mean()


def pair_error(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over C, H, W in float32: (2, B, C, H, W) to (2, B)."""
    return (pred.float() - target.float()).square().mean(dim=(2, 3, 4))


def dpo_terms(error: Tensor, reference_error: Tensor, beta: float) -> DPOTerms:
    """Diffusion-DPO (Wallace et al. 2023, Eq. 14) of `pair_error`s, each (2, B), winner first; for flow models of velocity errors."""
    winner, loser = (
        error - reference_error
    )  # (B,) each: how much worse than the reference we denoise it
    margin = -0.5 * beta * (winner - loser)
    return DPOTerms(-F.logsigmoid(margin), margin.detach(), error.detach(), reference_error)


def dpo_loss(pred: Tensor, reference_pred: Tensor, target: Tensor, beta: float) -> DPOTerms:
    """The same of the networks' outputs: pred, reference_pred, target all (2, B, C, H, W), winner first."""
    return dpo_terms(pair_error(pred, target), pair_error(reference_pred, target), beta)


def kl_strength(beta: float, elements: int, noising: Noising) -> float:
    """The KL strength that a code beta stands for: beta / (D sum_t w_t) (method.md section 7); elements: D, the latent's size."""
    return beta / (elements * noising.kl_weight)


def learning_rate(base: float, rule: str, beta: float, per_step: int = 1) -> float:
    """The actual learning rate. base: per pair of a step; per_step: pairs of a step, or 1 where base is not to be scaled by them.

    `inverse_beta`: base * per_step * 2000 / beta, the form that the DiffusionDPO paper states. `fixed`: without beta, as its code.
    """
    if rule not in ("inverse_beta", "fixed"):
        raise ValueError(f"the learning-rate rule must be inverse_beta or fixed, not {rule!r}")
    return base * per_step * (2000 / beta if rule == "inverse_beta" else 1.0)
