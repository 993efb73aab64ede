"""From moments to what an anchor is: its held-out loss at every lambda and beta, and their optima.

A new calibration would draw other pairs, so intervals resample pairs, and not draws: each pair has
one value, the mean over its draws. All values of a pair are drawn together.

Shapes: N pairs, M draws, K anchors, L lambdas, G betas of `BETAS`. Functions of one anchor take
moments with K = 1 (`Moments.of`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from deradiff.calibration.moments import Array, Moments
from deradiff.evaluation.statistics import Estimate, paired_bootstrap

LN_2 = math.log(2)
"""The loss of the reference, at every beta."""

BETAS = np.geomspace(1.0, 1e8, 400)
"""Among which a beta is looked for."""

LAMS = np.concatenate([[0.0], np.geomspace(0.003, 30.0, 320)])
"""Among which the best lambda is looked for, 3 % apart; the last is the most that is looked at."""


def pair_losses(moments: Moments, lams: Sequence[float] | Array, beta: float) -> Array:
    """The loss of Diffusion-DPO of each pair, (N,), at one mixture.

    Args:
        moments: of the pairs.
        lams: (K,), lambda of each anchor.
        beta: in the convention `mean-half`.
    """
    losses = np.logaddexp(0.0, -moments.margins(lams, beta))
    # Less the reference's, which is the same in every draw: where weights do not add up to their
    # number, it stays ln 2.
    return LN_2 + _mean_over_draws(losses - LN_2, moments.training_weights)


def pair_accuracies(moments: Moments, lams: Sequence[float] | Array) -> Array:
    """The implicit accuracy of each pair, (N,): 1 where the winner is preferred, 1/2 for neither.

    It does not depend on beta.

    Args:
        moments: of the pairs.
        lams: (K,), lambda of each anchor.
    """
    signs = np.sign(moments.margins(lams, 1.0))
    return 0.5 + _mean_over_draws(signs / 2, moments.training_weights)


def winner_errors(moments: Moments, lams: Sequence[float] | Array) -> Array:
    """The mean squared error on each winner less the reference's, (N,).

    Args:
        moments: of the pairs.
        lams: (K,), lambda of each anchor.
    """
    return _mean_over_draws(moments.errors(lams)[..., 0], moments.training_weights)


def mean_estimate(values: Array, seed: int = 0) -> Estimate:
    """The mean over pairs with its interval.

    Args:
        values: (N,), one for each pair.
        seed: of the resamples.
    """
    return paired_bootstrap(values[:, None], lambda means: means[..., 0], seed)


# The best lambda


def best_lam(moments: Moments, beta: float, seed: int = 0) -> Estimate:
    """lam*(beta): the lambda of the lowest held-out loss, of one anchor.

    0 says that the reference is best, and the last of `LAMS` that it is that or more.

    Args:
        moments: of one anchor.
        beta: in the convention `mean-half`.
        seed: of the resamples.
    """
    return paired_bootstrap(_losses_by_lam(moments, beta), lowest_lam, seed)


def best_lam_value(moments: Moments, beta: float) -> float:
    """lam*(beta) without its interval.

    Args:
        moments: of one anchor.
        beta: in the convention `mean-half`.
    """
    return float(lowest_lam(_losses_by_lam(moments, beta).mean(axis=0)))


def _losses_by_lam(moments: Moments, beta: float) -> Array:
    """The loss of each pair at each of `LAMS`, (N, L)."""
    return np.stack([pair_losses(moments, [lam], beta) for lam in LAMS], axis=1)


def lowest_lam(losses: Array) -> Array:
    """The lambda of the lowest loss: by the parabola in ln lam through the lowest of `LAMS`.

    Args:
        losses: (..., L), at `LAMS`.

    Returns:
        (...).
    """
    lowest = losses.argmin(axis=-1)
    # The two lowest places have no neighbour on the logarithmic scale, and the last has none at all
    middle = lowest.clip(2, len(LAMS) - 2)
    before, at, after = (
        np.take_along_axis(losses, (middle + shift)[..., None], axis=-1)[..., 0]
        for shift in (-1, 0, 1)
    )
    curvature = before - 2 * at + after
    with np.errstate(invalid="ignore", divide="ignore"):
        offset = np.where(curvature > 0, (before - after) / (2 * curvature), 0.0)
    spacing = math.log(LAMS[2] / LAMS[1])
    refined = LAMS[middle] * np.exp(spacing * offset.clip(-1, 1))
    return np.where(lowest == middle, refined, LAMS[lowest])


def loss_at_best_lam(moments: Moments, beta: float, seed: int = 0) -> Estimate:
    """The held-out loss at lam*, which is chosen by other pairs than it is judged by.

    The pairs of even numbers are judged at the lambda that those of odd numbers choose, and the
    other way round.

    Args:
        moments: of one anchor, and of at least two pairs.
        beta: in the convention `mean-half`.
        seed: of the resamples.
    """
    losses = _losses_by_lam(moments, beta)
    judged = np.empty(len(losses))
    for half in (0, 1):
        others = losses[1 - half :: 2].mean(axis=0)
        judged[half::2] = losses[half::2, others.argmin()]
    return mean_estimate(judged, seed)


# The beta that an anchor acts like


def effective_beta(moments: Moments, seed: int = 0) -> Estimate:
    """beta_eff: the beta at which the anchor as it is, at lam = 1, has the lowest held-out loss.

    There lam*(beta_eff) = 1. An end of `BETAS` says that it lies beyond.

    Args:
        moments: of one anchor.
        seed: of the resamples.
    """
    # With a margin of beta m(lam), the slope of the loss is -beta E sigma(-beta m) dm/dlam.
    margin = moments.margins([1.0], 1.0)
    growth = _margin_growth(moments)
    pulls = []
    for beta in BETAS:
        pull = expit(-beta * margin) * growth
        pulls.append(_mean_over_draws(pull, moments.training_weights))
    return paired_bootstrap(np.stack(pulls, axis=1), crossing, seed)


def trajectory_beta(moments: Moments, seed: int = 0) -> Estimate:
    """The beta at which the whole trajectory explains the labels best, of one anchor at lam = 1.

    The implicit reward of an image is beta times the mean over all timesteps, by the KL of their
    steps, in place of a single one: it is the temperature at which the anchor's likelihood over
    the reference's gives the labels' probabilities. An end of `BETAS` says that it lies beyond.

    The mean over few draws is noisy, and noise makes this beta smaller: compare it between anchors
    on the same pairs and draws alone.

    Args:
        moments: of one anchor.
        seed: of the resamples.
    """
    margin = _mean_over_draws(moments.margins([1.0], 1.0), moments.path_weights)
    # The slope of the loss in beta is -E sigma(-beta m) m.
    pulls = [expit(-beta * margin) * margin for beta in BETAS]
    return paired_bootstrap(np.stack(pulls, axis=1), crossing, seed)


def _margin_growth(moments: Moments) -> Array:
    """How fast the margin over beta grows in lambda at lam = 1, (N, M), of one anchor."""
    projection = moments.projection[..., 0]
    square = moments.gram[..., 0, 0]
    slope = -2 * projection + 2 * square
    return -0.5 * (slope[..., 0] - slope[..., 1])


def crossing(pulls: Array) -> Array:
    """Where a function of beta first falls to 0, interpolated in ln beta.

    Args:
        pulls: (..., G), at `BETAS`: above 0 below the wanted beta.

    Returns:
        (...); the first or the last of `BETAS` where it lies beyond them.
    """
    has_fallen = pulls <= 0
    first = np.where(has_fallen.any(axis=-1), has_fallen.argmax(axis=-1), len(BETAS) - 1)
    right = first.clip(min=1)
    high = np.take_along_axis(pulls, (right - 1)[..., None], axis=-1)[..., 0]
    low = np.take_along_axis(pulls, right[..., None], axis=-1)[..., 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(high > low, high / (high - low), 1.0).clip(0, 1)
    logs = np.log(BETAS)
    found = np.exp(logs[right - 1] + share * (logs[right] - logs[right - 1]))
    return np.where(first == 0, BETAS[0], found)


def is_found(beta: Estimate) -> bool:
    """Whether a beta lies within `BETAS`."""
    return bool(BETAS[0] < beta.value < BETAS[-1])


def _mean_over_draws(values: Array, weights: Array) -> Array:
    """The weighted mean of each pair's draws (N, M), (N,)."""
    return (weights * values).mean(axis=1)
