"""Algorithm 1 of DeRaDiff to the letter: a realigned reverse chain drawn from the closed-form
posterior mixtures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from deradiff.method.gaussian import weighted_mixture
from deradiff.method.lambdas import Lambda, Strength, broadcast_to, value_at
from deradiff.method.lambdas import trust_region as bounded
from deradiff.method.particles import Particles, log_weight
from deradiff.method.transitions import data_prediction, kl_factors, network_input, transition

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x, t) -> what the scheduler's prediction type says, for a noisy sample (B, C, ...) as the
network sees it, and its timestep.

(B, 2C, ...) where the scheduler's variance is learned. Rows must not depend on each other."""


def realigned_chain(
    reference: Denoiser,
    anchor: Denoiser | Sequence[Denoiser],
    scheduler: Any,
    x: Tensor,
    lam: Lambda | Sequence[Lambda],
    eta: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    *,
    particles: int | Particles = 1,
    trust_region: float | None = None,
) -> Tensor:
    """Samples of p_ref^(1 - sum lam_i) prod p_i^(lam_i), from initial noise x (B, C, ...) over
    `scheduler.timesteps`: (B, C, ...).

    Each step forms all models' transitions at the same x, mixes them geometrically and draws once.
    eta: DDIM's. Where the step is linear in the output and its variance fixed, `realign` comes to
    the same in any pipeline; with learned variances only this is exact.
    anchor, lam: one of each, or lists of as many; a lam is a number, a tensor with one for each row
    of x, a mask over the sample, or a schedule of the fraction of time (`deradiff.method.lambdas`).
    generator: one, or a list of one for each row, whose noise is then its own.
    particles: K consecutive rows of x are one image's particles, weighed and resampled
        (`deradiff.method.particles`), and (B / K, C, ...) comes back; a `Particles(K)` tells its
        effective sample size afterwards. trust_region: for lam > 1, how many nats the chain may go
        beyond the anchor's, an even share of which bounds each step's overshoot
        (`lambdas.trust_region`). Raises ValueError for a scheduler without closed form, a mixture
        that cannot be normalised, and rows that are no multiple of K.
    """
    anchors = [anchor] if callable(anchor) else list(anchor)
    asked: list[Any] = [lam] if callable(anchor) else list(lam)  # type: ignore[arg-type]
    if len(anchors) != len(asked) or (trust_region is not None and len(anchors) > 1):
        raise ValueError(
            f"{len(anchors)} anchors need as many values of lam as there are, {len(asked)}, and "
            f"trust_region is for one anchor"
        )
    cloud = particles if isinstance(particles, Particles) else Particles(particles)
    cloud.start(x)
    factors, previous = kl_factors(scheduler).tolist(), None
    for i, t in enumerate(scheduler.timesteps):
        seen = network_input(scheduler, t, x, index=i)
        outputs = [model(seen, t) for model in (reference, *anchors)]
        differences = [(output - outputs[0])[:, : x.shape[1]] for output in outputs[1:]]
        fraction = 1 - float(t) / scheduler.config.num_train_timesteps
        lams = [broadcast_to(value_at(value, fraction), x, 1) for value in asked]
        if trust_region is not None:
            lams = [_bounded(lams[0], factors[i], differences[0], trust_region / len(factors))]
        weights = [1 - sum(lams), *lams]

        p = weighted_mixture(
            [transition(scheduler, t, x, out, eta, previous=previous, index=i) for out in outputs],
            weights,
        )
        mixed = outputs[0][:, : x.shape[1]] + sum(value * d for value, d in zip(lams, differences))
        previous = data_prediction(
            scheduler, t, x, mixed, index=i
        )  # the history of multistep samplers is the mixed chain's
        x = p.mean + p.variance.sqrt() * randn_tensor(
            x.shape, generator=generator, device=x.device, dtype=x.dtype
        )

        if cloud.count > 1:
            cloud.reweigh(log_weight(factors[i], lams, differences))
            index = cloud.resample(last=i == len(factors) - 1)
            x, previous = (x, previous) if index is None else (x[index], previous[index])
    return x[:: cloud.count]


def _bounded(lam: Strength, factor: float, difference: Tensor, nats: float) -> Tensor:
    divergence = factor * difference.square().flatten(1).sum(1)
    return bounded(lam, divergence.view(-1, *[1] * (difference.ndim - 1)), nats)
