"""Moments without a network: of the analytic beds, and of a synthetic population of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deradiff.calibration.draws import TimeProposal
from deradiff.calibration.moments import Moments
from deradiff.training.noising import noising_of
from deradiff.worlds.beds import PRIOR, Bed


def bed_moments(
    bed: Bed, strengths: Sequence[float], scheduler: Any, pairs: int, draws: int, scale: float
) -> Moments:
    """The moments of exact anchors, on pairs of the reference's samples that the reward labels.

    Args:
        bed: on the line.
        strengths: of the K anchors.
        scheduler: of the noise; every timestep of training is one of its steps.
        pairs: N.
        draws: M.
        scale: the first of two samples is preferred with the probability sigmoid(scale (r_0 - r_1))
    """
    generator = torch.Generator().manual_seed(0)
    noising = noising_of(scheduler)
    scheduler.set_timesteps(len(noising.timesteps))
    reference, *anchors = bed.models(scheduler, [0.0, *strengths])

    # The winners and the losers, (2, N), and the draws, (N, M).
    clean = _labelled(bed, pairs, scale, generator)
    drawn = [TimeProposal(noising).draw(draws, generator) for _ in range(pairs)]
    timesteps = torch.stack([one.timesteps for one in drawn])
    noise = torch.randn(pairs, draws, generator=generator, dtype=torch.float64)

    # Networks see the samples of one timestep at a time.
    shape = (pairs, draws, 2)
    projection = np.zeros((*shape, len(anchors)))
    gram = np.zeros((*shape, len(anchors), len(anchors)))
    error = np.zeros(shape)
    for timestep in timesteps.unique():
        rows, columns = np.nonzero((timesteps == timestep).numpy())
        for side in (0, 1):
            latents = clean[side, rows].view(1, -1, 1, 1, 1)
            own_noise = noise[rows, columns].view(-1, 1, 1, 1)
            noisy, target = noising(latents, own_noise, timestep.repeat(len(rows)))
            x = noisy.reshape(-1, 1).double()
            output = reference(x, timestep)[:, 0]
            differences = [anchor(x, timestep)[:, 0] - output for anchor in anchors]
            difference = torch.stack(differences, dim=1)
            residual = target.reshape(-1).double() - output
            projection[rows, columns, side] = (residual[:, None] * difference).numpy()
            squares = difference[:, :, None] * difference[:, None, :]
            gram[rows, columns, side] = squares.numpy()
            error[rows, columns, side] = residual.square().numpy()
    return Moments(
        projection=projection,
        gram=gram,
        reference_error=error,
        times=noising.time(timesteps).numpy(),
        training_weights=torch.stack([one.training_weights for one in drawn]).numpy(),
        path_weights=torch.stack([one.path_weights for one in drawn]).numpy(),
    )


def _labelled(bed: Bed, pairs: int, scale: float, generator: torch.Generator) -> Tensor:
    """Pairs of samples of the reference, (2, N): the winners, then the losers."""
    shares = PRIOR.log_weights.exp()
    part = torch.multinomial(shares, 2 * pairs, replacement=True, generator=generator)
    normal = torch.randn(2 * pairs, generator=generator, dtype=torch.float64)
    samples = PRIOR.means[part, 0] + PRIOR.variances[part, 0].sqrt() * normal
    samples = samples.view(2, pairs)
    reward = bed.reward(samples)
    uniform = torch.rand(pairs, generator=generator, dtype=torch.float64)
    first_wins = uniform < torch.sigmoid(scale * (reward[0] - reward[1]))
    return torch.where(first_wins, samples, samples.flip(0))


def population(
    pairs: int, seed: int, draws: int = 2, gain: float = 1.0, anchors: int = 1
) -> Moments:
    """Moments of a synthetic population of pairs, in which an anchor prefers most winners.

    Args:
        pairs: N.
        seed: of the random choices.
        draws: M.
        gain: how far the anchor goes; 1: it acts like a beta of some hundreds.
        anchors: K; the others go in directions of their own, less far.
    """
    generator = np.random.default_rng(seed)
    shape = (pairs, draws, 2, anchors)
    sizes = gain * 0.7 ** np.arange(anchors)
    # What a pair has in common, and what its draws add.
    common = generator.normal(size=(pairs, 1, 2, anchors))
    own = generator.normal(size=shape)
    liking = np.array([1.0, -1.0])[:, None]
    projection = 1e-3 * sizes * (1.2 * liking + common + own)
    factor = sizes[:, None] * sizes
    correlation = 0.6 + 0.4 * np.eye(anchors)
    spread = 1 + 0.3 * generator.normal(size=(*shape[:3], 1, 1)) ** 2
    return Moments(
        projection=projection,
        gram=2e-3 * factor * correlation * spread,
        reference_error=np.ones(shape[:3]),
        times=generator.uniform(size=shape[:2]),
        training_weights=np.ones(shape[:2]),
        path_weights=np.ones(shape[:2]),
    )
