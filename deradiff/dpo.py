"""The Diffusion-DPO loss and the conventions of its beta (Wallace et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

BETA_CONVENTION = "mean-half"  # beta scales half the difference of errors, each a mean over C, H, W (the published code's)


@dataclass
class DPOTerms:
    """loss: scalar with gradient. margin: (B,), implicit reward of the winner over the loser. accuracy: scalar, ties count half.

    error, reference_error: (2, B) mean squared errors of the trained network and the reference, winner first.
    """

    loss: Tensor
    margin: Tensor
    accuracy: Tensor
    error: Tensor
    reference_error: Tensor


def dpo_loss(pred: Tensor, reference_pred: Tensor, target: Tensor, beta: float) -> DPOTerms:
    """Diffusion-DPO (Wallace et al. 2023, Eq. 14): pred, reference_pred, target all (2, B, C, H, W), winner first."""
    error = (pred.float() - target.float()).square().mean(dim=(2, 3, 4))
    reference_error = (reference_pred.float() - target.float()).square().mean(dim=(2, 3, 4))
    winner, loser = error - reference_error  # (B,) each: how much worse than the reference we denoise it
    margin = -0.5 * beta * (winner - loser)
    return DPOTerms(-F.logsigmoid(margin).mean(), margin.detach(), (margin.detach().sign() + 1).mean() / 2, error.detach(), reference_error)


def kl_strength(beta: float, elements: int, alpha_bars: Tensor) -> float:
    """The KL strength that a code beta stands for: beta / (D sum_t w_t), w_t = SNR_{t-1}/SNR_t - 1 (method.md section 7).

    elements: D, the latent's number of elements; alpha_bars: (T,) of the training schedule.
    """
    snr = alpha_bars.double() / (1 - alpha_bars.double())
    return beta / (elements * float((snr[:-1] / snr[1:] - 1).sum()))


def learning_rate(base: float, rule: str, beta: float, per_step: int = 1) -> float:
    """The actual learning rate. base: per pair of a step; per_step: pairs of a step, or 1 where base is not to be scaled by them.

    `inverse_beta`: base * per_step * 2000 / beta, the form that the DiffusionDPO paper states. `fixed`: without beta, as its code.
    """
    if rule not in ("inverse_beta", "fixed"):
        raise ValueError(f"the learning-rate rule must be inverse_beta or fixed, not {rule!r}")
    return base * per_step * (2000 / beta if rule == "inverse_beta" else 1.0)


def shared_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, scheduler: Any) -> tuple[Tensor, Tensor]:
    """Noisy latents and the network's target, each (P, B, C, H, W).

    The P pictures of an example share noise (B, C, H, W) and timesteps (B,).
    """
    both, t = noise.expand_as(latents).flatten(0, 1), timesteps.repeat(len(latents))
    clean = latents.flatten(0, 1)
    noisy = scheduler.add_noise(clean, both, t)
    target = both if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(clean, both, t)
    return noisy.unflatten(0, (len(latents), -1)), target.unflatten(0, (len(latents), -1))
