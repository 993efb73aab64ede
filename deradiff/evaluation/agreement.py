"""Whether two models' scores agree. Arrays in, numbers out.

Equivalence tests, win rates, limits of agreement, and distributions of errors.

Prompts are the independent draws: an array (P,) holds one value for each prompt, the mean over that
prompt's seeds, and nan where there is none.

Shapes: P prompts, C cells (a target and a scorer), N values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from deradiff.evaluation.statistics import LEVEL, Array, Estimate, resampled_means

ALPHA = 0.05
"""The level of a test."""

NORMAL = float(stats.norm.ppf((1 + LEVEL) / 2))
"""1.96: so many standard deviations hold 95 % of normal values."""


@dataclass(frozen=True)
class Equivalence:
    """The result of two one-sided paired tests (TOST).

    Attributes:
        p: the larger of the one-sided p-values; nan with one prompt.
        equivalent: p < 0.05.
        low: the lower end of the 90 % t interval of the mean difference. For a fixed margin the
            interval lies within it exactly where the models are equivalent. nan with one prompt.
        high: its upper end.
    """

    p: float
    equivalent: bool
    low: float
    high: float


def _student_t(values: Array) -> float:
    """Student's t of a mean.

    Infinite where all values are one number other than 0, and 0 where they all are 0.
    """
    mean = values.mean()
    error = values.std(ddof=1) / np.sqrt(len(values))
    if error > 0:
        return float(mean / error)
    return float(np.sign(mean) * np.inf) if mean else 0.0


def equivalence(difference: Array, margin: float | Array) -> Equivalence:
    """Test whether the mean difference lies within a margin (Schuirmann 1987).

    A large p says no more than that it is not shown.

    A margin may itself be measured, such as a share of target less reference. Then the difference
    plus and minus the margin are linear contrasts and are tested as such, whatever the sign of the
    margin's mean. As that sign is read off the data, the margin must also differ from 0 in a
    two-sided test at 5 %: the whole is an intersection-union test (Berger 1982), which keeps its
    level.

    Args:
        difference: (P,), the model less the target.
        margin: above 0, in the score's unit; or a measured one for each prompt (P,).

    Returns:
        The test's result; not equivalent where there are fewer than two prompts.

    Raises:
        ValueError: for a fixed margin that is not above 0.
    """
    is_measured = np.ndim(margin) > 0
    if not is_measured and not margin > 0:
        raise ValueError(f"the margin of an equivalence test must be above 0, not {margin}")

    # The prompts that have both
    difference = np.asarray(difference, dtype=np.float64)
    band = np.broadcast_to(np.asarray(margin, dtype=np.float64), difference.shape)
    present = ~np.isnan(difference) & ~np.isnan(band)
    difference = difference[present]
    band = band[present]
    prompts = len(difference)
    if prompts < 2:
        return Equivalence(np.nan, False, np.nan, np.nan)
    if band.mean() < 0:
        band = -band

    # Both one-sided tests, and a third one: is a measured margin one at all?
    student = stats.t(prompts - 1)
    p_below = student.cdf(_student_t(difference - band))
    p_above = student.sf(_student_t(difference + band))
    p = max(p_below, p_above)
    if is_measured:
        p = max(p, 2 * student.sf(_student_t(band)))

    # The interval of the mean difference
    mean = difference.mean()
    half = student.ppf(1 - ALPHA) * difference.std(ddof=1) / np.sqrt(prompts)
    return Equivalence(float(p), bool(p < ALPHA), float(mean - half), float(mean + half))


def win_share(wins: Array) -> Estimate:
    """The mean share of wins in percent, with Wilson's interval (1927) of P trials.

    The interval is exact in form for one image a prompt without ties. Otherwise it is conservative:
    among the distributions on [0, 1] of one mean, a coin's variance is the largest.

    Args:
        wins: (P,), a share in [0, 1] for each prompt: the mean over its seeds of 1, 1/2 or 0.

    Raises:
        ValueError: for no prompts.
    """
    wins = np.asarray(wins, dtype=np.float64)
    wins = wins[~np.isnan(wins)]
    prompts = len(wins)
    if prompts == 0:
        raise ValueError("a win rate needs at least one prompt")

    # Wilson's interval
    rate = wins.mean()
    z2 = NORMAL**2
    centre = (rate + z2 / (2 * prompts)) / (1 + z2 / prompts)
    variance = rate * (1 - rate) / prompts + z2 / (4 * prompts**2)
    half = NORMAL / (1 + z2 / prompts) * np.sqrt(variance)
    low = max(centre - half, 0)
    high = min(centre + half, 1)
    return Estimate(float(100 * rate), float(100 * low), float(100 * high))


def win_rate(model: Array, other: Array) -> Estimate:
    """The percentage of prompts whose mean score is higher with one model; ties count half.

    Args:
        model: (P,), that model's scores.
        other: (P,), of the same prompts.
    """
    difference = np.asarray(model, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return win_share((np.sign(difference) + 1) / 2)


@dataclass(frozen=True)
class LimitsOfAgreement:
    """What Bland and Altman (1986) draw of differences.

    Attributes:
        bias: the mean difference.
        lower: the bias less 1.96 standard deviations, with an interval of its own.
        upper: the bias plus as many. Between the two, 95 % of differences would lie.
        deviation: the standard deviation of the differences.
    """

    bias: Estimate
    lower: Estimate
    upper: Estimate
    deviation: float


def limits_of_agreement(differences: Array) -> LimitsOfAgreement:
    """The limits of agreement of independent differences, for a Bland-Altman plot.

    The bias has its interval by t. The limits have theirs exactly for normal differences, by the
    noncentral t distribution (Carkeet 2015).

    Args:
        differences: (N,).

    Raises:
        ValueError: for fewer than two.
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[~np.isnan(values)]
    count = len(values)
    if count < 2:
        raise ValueError("limits of agreement need at least two differences")

    # The bias
    bias = values.mean()
    deviation = values.std(ddof=1)
    half = stats.t.ppf((1 + LEVEL) / 2, count - 1) * deviation / np.sqrt(count)

    # How far from the bias a limit may lie
    levels = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    quantiles = stats.nct.ppf(levels, count - 1, NORMAL * np.sqrt(count))
    near, far = quantiles * deviation / np.sqrt(count)
    width = NORMAL * deviation
    return LimitsOfAgreement(
        bias=Estimate(float(bias), float(bias - half), float(bias + half)),
        lower=Estimate(float(bias - width), float(bias - far), float(bias - near)),
        upper=Estimate(float(bias + width), float(bias + near), float(bias + far)),
        deviation=float(deviation),
    )


@dataclass(frozen=True)
class Ecdf:
    """An empirical distribution function with its band.

    Attributes:
        x: (N,), ascending.
        share: (N,), in [0, 1]: of values that are at most x.
        low: (N,), the band's lower edge.
        high: (N,), its upper edge.
    """

    x: Array
    share: Array
    low: Array
    high: Array


def error_ecdf(model: Array, target: Array, seed: int = 0, at: Array | None = None) -> Ecdf:
    """The distribution function of the absolute approximation errors of cells (the paper's figure).

    Cells share prompts and anchors, so they are not independent: the band is a bootstrap over
    prompts, 95 % at each x. An absolute value of a noisy mean is too large on average, so the band
    lies on the side of larger errors where errors are within their noise.

    Args:
        model: (P, C), a row for each prompt.
        target: (P, C).
        seed: of the draws.
        at: (N,), where the function is wanted beside the errors; None: nowhere.

    Returns:
        The function at the C errors, and at the N places.
    """
    # Means of the sample (row 0) and of R resamples
    cells = model.shape[1]
    means = resampled_means(np.concatenate([model, target], axis=1), seed)
    errors = abs(means[:, :cells] - means[:, cells:])

    # The share of errors up to each place, and its band
    x = np.sort(errors[0] if at is None else np.concatenate([errors[0], at]))
    shares = np.stack([(errors <= limit).mean(axis=1) for limit in x], axis=1)  # (1 + R, C + N)
    levels = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(shares[1:], levels, axis=0)
    return Ecdf(x, shares[0], low, high)
