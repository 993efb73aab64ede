"""Approximation errors of paired scores. Arrays in, numbers out.

Every interval is a percentile bootstrap over prompts. A new evaluation would draw other prompts, so
prompts are resampled, and not images: an array holds one value for each prompt, the mean over that
prompt's seeds. All columns of a prompt are drawn together, so that what prompts differ in cancels
from every difference.

Shapes: P prompts, K columns of values, C cells (a target and a scorer), R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 2000
"""R: how often the prompts are drawn anew for an interval."""

LEVEL = 0.95
"""The coverage of an interval."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval.

    Attributes:
        value: the number.
        low: the interval's lower end; nan where there is one prompt alone.
        high: its upper end; nan likewise.
    """

    value: float
    low: float
    high: float

    def absolute(self) -> Estimate:
        """The estimate of |x|, from this one of x.

        An interval that holds 0 becomes one from 0 to its farther end, so that 0 stays in it.
        """
        near, far = sorted((abs(self.low), abs(self.high)))
        if self.low <= 0 <= self.high:
            near = 0.0
        return Estimate(abs(self.value), near, far)


UNKNOWN = Estimate(np.nan, np.nan, np.nan)
"""An estimate of something that cannot be estimated."""


@lru_cache(maxsize=8)
def _draw_counts(prompts: int, seed: int) -> Array:
    """How often each prompt was drawn: (1 + R, P); the first row is the sample itself."""
    generator = np.random.default_rng(seed)
    uniform = np.full(prompts, 1 / prompts)
    draws = generator.multinomial(prompts, uniform, size=RESAMPLES)
    return np.vstack([np.ones(prompts), draws])


def resampled_means(values: Array, seed: int = 0) -> Array:
    """The means of columns, of the sample and of resamples of its rows with replacement.

    Args:
        values: (P, K), a row for each prompt. A nan does not count in its column's mean.
        seed: of the draws. The same seed draws the same prompts, for any columns.

    Returns:
        (1 + R, K); the first row is the sample's.

    Raises:
        ValueError: for no rows.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("a bootstrap needs at least one prompt")
    counts = _draw_counts(len(values), seed)
    present = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        sums = counts @ np.where(present, values, 0.0)
        return sums / (counts @ present)


def paired_bootstrap(
    values: Array, statistic: Callable[[Array], Array], seed: int = 0, level: float = LEVEL
) -> Estimate:
    """A statistic of column means with its percentile interval (Efron and Tibshirani 1993, ch. 13).

    Args:
        values: (P, K), as `resampled_means` takes them.
        statistic: (..., K) -> (...) of column means. It is called once, on those of the sample and
            of all resamples.
        seed: of the draws.
        level: the interval's coverage.

    Raises:
        ValueError: for no rows.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        statistics = statistic(resampled_means(values, seed))
    value = float(statistics[0])
    resampled = statistics[1:]

    # The interval; one prompt alone has none
    finite = resampled[np.isfinite(resampled)]
    if len(values) == 1 or not len(finite):
        return Estimate(value, np.nan, np.nan)
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


@dataclass(frozen=True)
class ApproximationError:
    """How far a model's mean score is from that of the model that it stands for, the target.

    Attributes:
        difference: the model's mean less the target's.
        error: |difference|: the paper's approximation error.
        percent_of_mean: the error in percent of |the target's mean|.
        share: the error in percent of `distance`: 0 is the target itself, and 100 is as far off as
            the reference.
        distance: |the target's mean less the reference's|.
    """

    difference: Estimate
    error: Estimate
    percent_of_mean: Estimate
    share: Estimate
    distance: Estimate

    @property
    def distance_is_clear(self) -> bool:
        """Whether the distance is clearly above 0. Where it is not, a share of it says nothing."""
        return self.distance.low > 0


def approximation_error(
    model: Array, target: Array, reference: Array, seed: int = 0
) -> ApproximationError:
    """The approximation error of one realigned model.

    Args:
        model: (P,), its scores.
        target: (P,), of the same prompts.
        reference: (P,), of the same prompts.
        seed: of the draws.
    """
    values = np.stack([model, target, reference], axis=1)

    def estimate(statistic: Callable[[Array, Array, Array], Array]) -> Estimate:
        def of_means(means: Array) -> Array:
            return statistic(means[..., 0], means[..., 1], means[..., 2])

        return paired_bootstrap(values, of_means, seed)

    difference = estimate(lambda m, t, r: m - t)
    return ApproximationError(
        difference=difference,
        error=difference.absolute(),
        percent_of_mean=estimate(lambda m, t, r: 100 * (m - t) / t).absolute(),
        share=estimate(lambda m, t, r: 100 * (m - t) / (t - r)).absolute(),
        distance=estimate(lambda m, t, r: t - r).absolute(),
    )


def share_of_anchor(
    model: Array, target: Array, anchor: Array, reference: Array, seed: int = 0
) -> Estimate:
    """The approximation error in percent of what the anchor itself changed.

    That is |the anchor's mean less the reference's|, one unit for all targets of an anchor.

    Args:
        model: (P,), the realigned model's scores.
        target: (P,), of the same prompts.
        anchor: (P,), of the same prompts.
        reference: (P,), of the same prompts.
        seed: of the draws.

    Returns:
        nan where what the anchor changed is not clearly above 0.
    """
    values = np.stack([model, target, anchor, reference], axis=1)

    def changed(means: Array) -> Array:
        return means[..., 2] - means[..., 3]

    def share(means: Array) -> Array:
        return 100 * (means[..., 0] - means[..., 1]) / changed(means)

    if paired_bootstrap(values, changed, seed).absolute().low <= 0:
        return UNKNOWN
    return paired_bootstrap(values, share, seed).absolute()


@dataclass(frozen=True)
class MeanApproximationError:
    """Approximation errors averaged over cells.

    Attributes:
        error: the mean of |model - target| (the paper's MAE).
        percent_of_mean: the mean of the errors in percent of the target's mean.
        share: the mean of the errors in percent of the distance, over the cells with a clear one;
            nan where there is none.
    """

    error: Estimate
    percent_of_mean: Estimate
    share: Estimate


def mean_approximation_error(
    model: Array, target: Array, reference: Array, clear: NDArray[np.bool_], seed: int = 0
) -> MeanApproximationError:
    """The mean approximation error over cells.

    An average of absolute values cannot be 0: where every difference is noise, so is the lower end
    of the interval.

    Args:
        model: (P, C), nan where a prompt lacks a cell.
        target: (P, C).
        reference: (P, C).
        clear: (C,), the cells whose share counts.
        seed: of the draws.
    """
    cells = model.shape[1]
    values = np.concatenate([model, target, reference], axis=1)

    def estimate(
        statistic: Callable[[Array, Array, Array], Array], which: NDArray[np.bool_]
    ) -> Estimate:
        if not which.any():
            return UNKNOWN

        def mean_over_cells(means: Array) -> Array:
            m = means[..., :cells][..., which]
            t = means[..., cells : 2 * cells][..., which]
            r = means[..., 2 * cells :][..., which]
            return statistic(m, t, r).mean(axis=-1)

        return paired_bootstrap(values, mean_over_cells, seed)

    every = np.ones(cells, dtype=bool)
    return MeanApproximationError(
        error=estimate(lambda m, t, r: abs(m - t), every),
        percent_of_mean=estimate(lambda m, t, r: 100 * abs((m - t) / t), every),
        share=estimate(lambda m, t, r: 100 * abs((m - t) / (t - r)), clear),
    )


@dataclass(frozen=True)
class ErrorSpread:
    """How the errors of cells are spread, and how large they are beside what prompts differ in.

    Attributes:
        under: the share of errors at most the threshold, in percent.
        median: of the errors.
        deviation: the standard deviation of the target's scores over prompts, mean over cells.
        median_percent: the median error in percent of it (the paper's "20 % of its standard
            deviation").
    """

    under: Estimate
    median: Estimate
    deviation: float
    median_percent: Estimate


def error_spread(
    model: Array, target: Array, threshold: float | Array, seed: int = 0
) -> ErrorSpread:
    """How the absolute approximation errors of cells are spread.

    Args:
        model: (P, C), a row for each prompt.
        target: (P, C).
        threshold: one for all cells, or one for each (C,).
        seed: of the draws.
    """
    cells = model.shape[1]
    values = np.concatenate([model, target], axis=1)
    deviation = _mean_deviation(target)

    def estimate(statistic: Callable[[Array], Array]) -> Estimate:
        def of_errors(means: Array) -> Array:
            return statistic(abs(means[..., :cells] - means[..., cells:]))

        return paired_bootstrap(values, of_errors, seed)

    return ErrorSpread(
        under=estimate(lambda errors: 100 * (errors <= threshold).mean(axis=-1)),
        median=estimate(lambda errors: np.median(errors, axis=-1)),
        deviation=deviation,
        median_percent=estimate(lambda errors: 100 * np.median(errors, axis=-1) / deviation),
    )


def _mean_deviation(scores: Array) -> float:
    """The standard deviation of each column (P, C) over its prompts, mean over columns."""
    with np.errstate(invalid="ignore", divide="ignore"):
        present = (~np.isnan(scores)).sum(axis=0)
        means = np.where(present > 0, np.nansum(scores, axis=0) / present, np.nan)
        variances = np.nansum((scores - means) ** 2, axis=0) / (present - 1)
        return float(np.nanmean(np.sqrt(variances)))
