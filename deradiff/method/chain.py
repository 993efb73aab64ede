"""Algorithm 1 of DeRaDiff: a reverse chain that draws each step from the mixture of all models.

Shapes: x (B, C, ...), a batch of B samples; an output is the same, or (B, 2C, ...) where the
variance is learned. With K particles B = images * K, an image's particles one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from deradiff.method.gaussian import weighted_mixture
from deradiff.method.lambdas import Lambda, Strength, broadcast_to, limit_lam, value_at
from deradiff.method.particles import Particles, log_weight
from deradiff.method.transitions import data_prediction, kl_factors, network_input, transition

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""A network: (x, timestep) -> its output, in the sense of the scheduler's prediction type.

x (B, C, ...) is the noisy sample as the network expects it. Rows must not depend on each other.
"""


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
    """Samples of p_ref^(1 - sum lam_i) prod p_i^(lam_i), from noise to data.

    At each step all models' transitions are formed at the same x, mixed geometrically, and one
    sample is drawn from the mixture. `deradiff.realign` does the same inside a pipeline, and at
    less cost, where a step is linear in the output and its variance is fixed. With learned
    variances only this is exact.

    Args:
        reference: the network at lam = 0.
        anchor: the network at lam = 1, or a list of them.
        scheduler: a diffusers scheduler, after `set_timesteps`.
        x: the noise at the start (B, C, ...).
        lam: a number, a number for each row (B,), a mask over the sample, or a schedule over time
            (`deradiff.method.lambdas`); a list of these for a list of anchors.
        eta: of DDIM; the other samplers have none.
        generator: of the noise; or a list with one for each row, which then has its own noise.
        particles: K, or `Particles(K)`, which has the effective sample size afterwards
            (`deradiff.method.particles`).
        trust_region: for lam > 1: nats of KL that the chain may go from the anchor's chain, in
            equal shares for each step (`lambdas.limit_lam`). It is for one anchor.

    Returns:
        (B / K, C, ...).

    Raises:
        ValueError: for a scheduler without a closed form, a mixture that cannot be normalised, rows
            that are not a multiple of K, and another number of lams than of anchors.
    """
    anchors, lambdas = _as_lists(anchor, lam, trust_region)
    cloud = particles if isinstance(particles, Particles) else Particles(particles)
    cloud.start(x)
    factors = kl_factors(scheduler).tolist()
    previous = None
    for i, t in enumerate(scheduler.timesteps):
        # One evaluation of each network, at the same x.
        network_x = network_input(scheduler, t, x, index=i)
        outputs = [model(network_x, t) for model in (reference, *anchors)]
        reference_output, *differences = _differences(outputs, channels=x.shape[1])

        # Lambda at this step.
        fraction = 1 - float(t) / scheduler.config.num_train_timesteps
        lams = [broadcast_to(value_at(value, fraction), x, 1) for value in lambdas]
        if trust_region is not None:
            share = trust_region / len(factors)
            lams = [_limited(lams[0], factors[i], differences[0], share)]

        # The mixture of all models' transitions.
        steps = []
        for output in outputs:
            steps.append(transition(scheduler, t, x, output, eta, previous=previous, index=i))
        p = weighted_mixture(steps, [1 - sum(lams), *lams])

        # The history of a multistep sampler is that of the mixed output.
        shift = sum(value * difference for value, difference in zip(lams, differences))
        previous = data_prediction(scheduler, t, x, reference_output + shift, index=i)

        # One draw.
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = p.mean + p.variance.sqrt() * noise

        # The corrector.
        if cloud.count > 1:
            cloud.reweigh(log_weight(factors[i], lams, differences))
            index = cloud.resample(last=i == len(factors) - 1)
            if index is not None:
                x = x[index]
                previous = previous[index]
    return x[:: cloud.count]


def _as_lists(
    anchor: Denoiser | Sequence[Denoiser],
    lam: Lambda | Sequence[Lambda],
    trust_region: float | None,
) -> tuple[list[Denoiser], list[Any]]:
    """The anchors and the lam of each, one or several."""
    if callable(anchor):
        return [anchor], [lam]
    anchors = list(anchor)
    lams: list[Any] = list(lam)  # type: ignore[arg-type]
    if len(anchors) != len(lams):
        raise ValueError(
            f"{len(anchors)} anchors need {len(anchors)} values of lam, and there are {len(lams)}"
        )
    if trust_region is not None and len(anchors) > 1:
        raise ValueError(
            f"trust_region is for one anchor, and there are {len(anchors)}: remove trust_region"
        )
    return anchors, lams


def _differences(outputs: Sequence[Tensor], channels: int) -> list[Tensor]:
    """The reference's output, and each anchor's output minus it, without learned variances."""
    predictions = [output[:, :channels] for output in outputs]
    reference, *others = predictions
    return [reference, *(other - reference for other in others)]


def _limited(lam: Strength, kl_factor: float, difference: Tensor, nats: float) -> Strength:
    """Lambda within the trust region of one step."""
    divergence = kl_factor * difference.square().flatten(1).sum(1)
    column = divergence.view(-1, *[1] * (difference.ndim - 1))
    return limit_lam(lam, column, nats)
