"""Whether two models' scores agree: equivalence tests, win rates, limits of agreement,
distributions of errors. Arrays in, numbers out.

Prompts are the independent draws: an array (P,) holds one value a prompt, the mean over that
prompt's seeds, and nan where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from deradiff.evaluation.statistics import LEVEL, Array, Estimate, resampled_means

ALPHA = 0.05
NORMAL = float(stats.norm.ppf((1 + LEVEL) / 2))


@dataclass(frozen=True)
class Equivalence:
    """A paired TOST. p: the larger of its one-sided p-values; equivalent: p < .05. low, high: the
    90 % t interval of the mean difference, which for a fixed margin lies within it exactly where
    the models are equivalent. p, low and high are nan with one prompt.
    """

    p: float
    equivalent: bool
    low: float
    high: float


def _t(values: Array) -> float:
    """Student's t of a mean; infinite where all values are one number other than 0, and 0 where
    they all are 0."""
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
    if error > 0:
        return float(mean / error)
    return float(np.sign(mean) * np.inf) if mean else 0.0


def equivalence(difference: Array, margin: float | Array) -> Equivalence:
    """Two one-sided paired t tests (Schuirmann 1987): is the mean difference within +- margin? A
    large p only says that it is not shown.

    difference: (P,), model less target. margin: above 0, in the score's unit; or one a prompt,
        (P,), for a margin that is itself measured, such as a share of target less reference. Then
        difference -+ margin are linear contrasts, tested as such, of whichever sign the margin's
        mean has; and as that sign is read off the data, the margin must also differ from 0 in a
        two-sided test at 5 %, so that the whole, an intersection-union test (Berger 1982), keeps
        its level. Raises ValueError for a fixed margin that is not above 0.
    """
    if np.ndim(margin) == 0 and not margin > 0:
        raise ValueError(f"the margin of an equivalence test must be above 0, not {margin}")
    difference = np.asarray(difference, dtype=np.float64)
    band = np.broadcast_to(np.asarray(margin, dtype=np.float64), difference.shape)
    present = ~np.isnan(difference) & ~np.isnan(band)
    difference, band = difference[present], band[present]
    prompts = len(difference)
    if prompts < 2:
        return Equivalence(np.nan, False, np.nan, np.nan)
    band = band if band.mean() >= 0 else -band
    student = stats.t(prompts - 1)
    p = max(student.cdf(_t(difference - band)), student.sf(_t(difference + band)))
    if np.ndim(margin):
        p = max(p, 2 * student.sf(_t(band)))
    half = student.ppf(1 - ALPHA) * difference.std(ddof=1) / np.sqrt(prompts)
    return Equivalence(
        float(p), bool(p < ALPHA), float(difference.mean() - half), float(difference.mean() + half)
    )


def win_share(wins: Array) -> Estimate:
    """Mean of (P,) per-prompt shares of wins, each in [0, 1] (the mean over a prompt's seeds of 1,
    1/2 or 0), in percent.

    Wilson's interval (1927) with P trials: exact in form for one image a prompt without ties, and
    otherwise conservative, since among the distributions on [0, 1] of one mean a coin's variance is
    the largest. Raises ValueError for no prompts.
    """
    wins = np.asarray(wins, dtype=np.float64)
    wins = wins[~np.isnan(wins)]
    prompts = len(wins)
    if prompts == 0:
        raise ValueError("a win rate needs at least one prompt")
    rate, z2 = wins.mean(), NORMAL**2
    centre = (rate + z2 / (2 * prompts)) / (1 + z2 / prompts)
    half = (
        NORMAL / (1 + z2 / prompts) * np.sqrt(rate * (1 - rate) / prompts + z2 / (4 * prompts**2))
    )
    return Estimate(
        float(100 * rate), float(100 * max(centre - half, 0)), float(100 * min(centre + half, 1))
    )


def win_rate(model: Array, other: Array) -> Estimate:
    """Percent of prompts whose mean score is higher with the model than with the other, ties half.
    model, other: (P,), paired."""
    difference = np.asarray(model, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return win_share((np.sign(difference) + 1) / 2)


@dataclass(frozen=True)
class LimitsOfAgreement:
    """Bland and Altman (1986). bias: mean difference. lower, upper: bias -+ 1.96 standard
    deviations, between which 95 % of differences would lie, each with its own interval. deviation:
    of the differences."""

    bias: Estimate
    lower: Estimate
    upper: Estimate
    deviation: float


def limits_of_agreement(differences: Array) -> LimitsOfAgreement:
    """Limits of agreement of (N,) independent differences, for a Bland-Altman plot. Raises
    ValueError for fewer than two.

    Intervals: the bias's by t; the limits' exactly, for normal differences, by the noncentral t
        distribution (Carkeet 2015).
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[~np.isnan(values)]
    count = len(values)
    if count < 2:
        raise ValueError("limits of agreement need at least two differences")
    bias, deviation = values.mean(), values.std(ddof=1)
    half = stats.t.ppf((1 + LEVEL) / 2, count - 1) * deviation / np.sqrt(count)
    near, far = (
        stats.nct.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], count - 1, NORMAL * np.sqrt(count))
        * deviation
        / np.sqrt(count)
    )
    return LimitsOfAgreement(
        bias=Estimate(float(bias), float(bias - half), float(bias + half)),
        lower=Estimate(float(bias - NORMAL * deviation), float(bias - far), float(bias - near)),
        upper=Estimate(float(bias + NORMAL * deviation), float(bias + near), float(bias + far)),
        deviation=float(deviation),
    )


@dataclass(frozen=True)
class Ecdf:
    """An empirical distribution function: at x (N,), ascending, share in [0, 1] of values at most
    x, and its band."""

    x: Array
    share: Array
    low: Array
    high: Array


def ecdf(values: Array) -> Ecdf:
    """Of N independent values, with the Dvoretzky-Kiefer-Wolfowitz band in Massart's constant: 95 %
    for the whole curve at once."""
    x = np.sort(np.asarray(values, dtype=np.float64))
    x = x[~np.isnan(x)]
    if not len(x):
        raise ValueError("a distribution function needs at least one value")
    share = np.arange(1, len(x) + 1) / len(x)
    half = np.sqrt(np.log(2 / (1 - LEVEL)) / (2 * len(x)))
    return Ecdf(x, share, np.clip(share - half, 0, 1), np.clip(share + half, 0, 1))


def error_ecdf(model: Array, target: Array, seed: int = 0) -> Ecdf:
    """Of the absolute approximation errors of C cells; model, target: (P, C), a row a prompt. The
    paper's figure.

    Cells share prompts and anchors, so they are not independent: the band is a bootstrap over
    prompts, 95 % at each x. An absolute value of a noisy mean is too large on average, so the band
    lies on the side of larger errors where errors are within their noise.
    """
    cells = model.shape[1]
    means = resampled_means(np.concatenate([model, target], axis=1), seed)
    errors = abs(means[:, :cells] - means[:, cells:])
    x = np.sort(errors[0])
    drawn = np.stack([(errors <= at).mean(axis=1) for at in x], axis=1)  # (1 + 2000, C)
    low, high = np.quantile(drawn[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Ecdf(x, drawn[0], low, high)
