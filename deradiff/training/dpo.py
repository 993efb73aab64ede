"""The Diffusion-DPO loss (Wallace et al. 2023), and its beta.

Beta follows the convention `mean-half` of the published code: it multiplies half the difference of
the errors, and an error is a mean over C, H and W.

Shapes: B pairs; the first axis, of 2, is the winner and the loser, in this order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from deradiff.training.noising import Noising
from deradiff.training.options import LEARNING_RATE_RULES

BETA_OF_RATE = 2000  # the beta at which the rule `inverse_beta` changes no learning rate


@dataclass
class DPOTerms:
    """The loss of a batch of pairs and what it is made of.

    Attributes:
        losses: (B,) the loss of each pair, with gradient.
        margin: (B,) the implicit reward of the winner less that of the loser.
        error: (2, B) mean squared errors of the trained network.
        reference_error: (2, B) mean squared errors of the reference.
    """

    losses: Tensor
    margin: Tensor
    error: Tensor
    reference_error: Tensor

    @property
    def loss(self) -> Tensor:
        """The scalar loss, with gradient: a mean of logarithms, not the logarithm of a mean."""
        return self.losses.mean()

    @property
    def accuracies(self) -> Tensor:
        """(B,) 1 where the winner is preferred, 0 where the loser is, 1/2 where neither is."""
        return (self.margin.sign() + 1) / 2

    @property
    def accuracy(self) -> Tensor:
        """The mean of `accuracies`."""
        return self.accuracies.mean()


def pair_error(pred: Tensor, target: Tensor) -> Tensor:
    """The mean squared error over C, H and W in float32.

    Args:
        pred: outputs of a network, (2, B, C, H, W).
        target: what they should be, (2, B, C, H, W).

    Returns:
        (2, B).
    """
    return (pred.float() - target.float()).square().mean(dim=(2, 3, 4))


def dpo_terms(error: Tensor, reference_error: Tensor, beta: float) -> DPOTerms:
    """The loss of Diffusion-DPO from errors (Wallace et al. 2023, Eq. 14).

    Args:
        error: `pair_error` of the trained network, (2, B); for flow models, of velocities.
        reference_error: `pair_error` of the reference, (2, B).
        beta: in the convention `mean-half`.
    """
    # How much worse than the reference the trained network denoises each image, (B,).
    winner, loser = error - reference_error
    margin = -0.5 * beta * (winner - loser)
    return DPOTerms(-F.logsigmoid(margin), margin.detach(), error.detach(), reference_error)


def dpo_loss(pred: Tensor, reference_pred: Tensor, target: Tensor, beta: float) -> DPOTerms:
    """The loss of Diffusion-DPO from the networks' outputs.

    Args:
        pred: outputs of the trained network, (2, B, C, H, W).
        reference_pred: outputs of the reference, (2, B, C, H, W).
        target: (2, B, C, H, W).
        beta: in the convention `mean-half`.
    """
    return dpo_terms(pair_error(pred, target), pair_error(reference_pred, target), beta)


def kl_strength(beta: float, elements: int, noising: Noising) -> float:
    """The KL strength that a beta of the code stands for: beta / (D sum_t w_t).

    See docs/method.md, *Beta has one convention*.

    Args:
        beta: in the convention `mean-half`.
        elements: D, the number of elements of a latent.
        noising: the forward process, whose `kl_weight` is the sum.
    """
    return beta / (elements * noising.kl_weight)


def learning_rate(base: float, rule: str, beta: float, pairs_per_step: int = 1) -> float:
    """The learning rate of a step.

    Args:
        base: the rate that the config gives.
        rule: `inverse_beta`: base * pairs_per_step * 2000 / beta, as the DiffusionDPO paper
            states it; `fixed`: base * pairs_per_step, as its code has it.
        beta: in the convention `mean-half`.
        pairs_per_step: pairs of one optimiser step; 1 where base is a rate per step.

    Raises:
        ValueError: for an unknown rule.
    """
    if rule not in LEARNING_RATE_RULES:
        raise ValueError(f"the learning-rate rule must be inverse_beta or fixed, not {rule!r}")
    scale = BETA_OF_RATE / beta if rule == "inverse_beta" else 1.0
    return base * pairs_per_step * scale
