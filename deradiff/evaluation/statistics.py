"""Approximation errors of paired scores: arrays in, numbers out. Every interval is a percentile
bootstrap over prompts.

Prompts are what a new evaluation would draw anew, so prompts are resampled, not images: an array
holds one value a prompt, the mean over that prompt's seeds. All columns of a prompt are drawn
together, so that what prompts differ in cancels from every difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES, LEVEL = 2000, 0.95


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval. The interval is nan where one prompt is all there is."""

    value: float
    low: float
    high: float

    def absolute(self) -> Estimate:
        """Of |x|, from the estimate of x: an interval that holds 0 becomes [0, its farther end],
        never one that leaves 0 out."""
        near, far = sorted((abs(self.low), abs(self.high)))
        return Estimate(abs(self.value), 0.0 if self.low <= 0 <= self.high else near, far)


@lru_cache(maxsize=8)
def _counts(prompts: int, seed: int) -> Array:
    """(1 + 2000, P): how often each prompt was drawn; the first row is the sample itself."""
    draws = np.random.default_rng(seed).multinomial(
        prompts, np.full(prompts, 1 / prompts), size=RESAMPLES
    )
    return np.vstack([np.ones(prompts), draws])


def resampled_means(values: Array, seed: int = 0) -> Array:
    """Column means (1 + 2000, K) of the sample, and of 2000 resamples of its rows with replacement.

    values: (P, K), a row a prompt; a nan is left out of its column's mean. Raises ValueError for no
        rows.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("a bootstrap needs at least one prompt")
    counts, present = _counts(len(values), seed), ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts @ np.where(present, values, 0.0) / (counts @ present)


def paired_bootstrap(
    values: Array, statistic: Callable[[Array], Array], seed: int = 0, level: float = LEVEL
) -> Estimate:
    """Percentile interval of a statistic of column means (Efron and Tibshirani 1993, chapter 13),
    rows resampled with replacement.

    values: (P, K), as in `resampled_means`. statistic: column means (..., K) -> (...); it is called
        once, on the sample's means and those of 2000 resamples. Raises ValueError for no rows.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        found = statistic(resampled_means(values, seed))
    drawn = found[1:][np.isfinite(found[1:])]
    if len(values) == 1 or not len(drawn):
        return Estimate(float(found[0]), np.nan, np.nan)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(found[0]), float(low), float(high))


@dataclass(frozen=True)
class ApproximationError:
    """How far a model's mean score lies from the mean score of the model that it stands for, the
    target.

    difference: signed, model less target. error: |difference| (the paper's approximation error).
        percent_of_mean: of |target mean|.
    share: error in percent of `distance`, |target mean - reference mean|: 0 is the target itself,
        100 is as far off as the reference.
    """

    difference: Estimate
    error: Estimate
    percent_of_mean: Estimate
    share: Estimate
    distance: Estimate

    @property
    def distance_is_clear(self) -> bool:
        """Whether the interval of the distance leaves 0 out; where it does not, a share of it says
        nothing."""
        return self.distance.low > 0


def approximation_error(
    model: Array, target: Array, reference: Array, seed: int = 0
) -> ApproximationError:
    """Approximation error of one realigned model with intervals. model, target, reference: (P,),
    paired by prompt."""
    values = np.stack([model, target, reference], axis=1)

    def estimate(statistic: Callable[[Array, Array, Array], Array]) -> Estimate:
        return paired_bootstrap(
            values, lambda means: statistic(means[..., 0], means[..., 1], means[..., 2]), seed
        )

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
    """The error in percent of what the anchor itself changed, |anchor mean - reference mean|: one
    unit for all targets of an anchor.

    All (P,), paired by prompt. nan where the interval of that distance holds 0.
    """
    values = np.stack([model, target, anchor, reference], axis=1)
    distance = paired_bootstrap(values, lambda means: means[..., 2] - means[..., 3], seed)
    if distance.absolute().low <= 0:
        return Estimate(np.nan, np.nan, np.nan)
    share = lambda means: 100 * (means[..., 0] - means[..., 1]) / (means[..., 2] - means[..., 3])  # noqa: E731
    return paired_bootstrap(values, share, seed).absolute()


@dataclass(frozen=True)
class MeanApproximationError:
    """Approximation errors averaged over cells; share: over the cells with a clear distance, nan
    where there is none."""

    error: Estimate
    percent_of_mean: Estimate
    share: Estimate


def mean_approximation_error(
    model: Array, target: Array, reference: Array, clear: NDArray[np.bool_], seed: int = 0
) -> MeanApproximationError:
    """Mean over C cells of the approximation error (the paper's MAE), with intervals.

    model, target, reference: (P, C), a row a prompt, nan where a cell lacks it. clear: (C,), the
    cells whose share counts. An average of absolute values cannot be 0: where every difference is
    noise, so is the interval's lower end.
    """
    cells = model.shape[1]
    values = np.concatenate([model, target, reference], axis=1)

    def estimate(
        statistic: Callable[[Array, Array, Array], Array], which: NDArray[np.bool_]
    ) -> Estimate:
        if not which.any():
            return Estimate(np.nan, np.nan, np.nan)

        def split(means: Array) -> list[Array]:
            return [means[..., i * cells : (i + 1) * cells][..., which] for i in range(3)]

        return paired_bootstrap(values, lambda means: statistic(*split(means)).mean(axis=-1), seed)

    every = np.ones(cells, dtype=bool)
    return MeanApproximationError(
        error=estimate(lambda m, t, r: abs(m - t), every),
        percent_of_mean=estimate(lambda m, t, r: 100 * abs((m - t) / t), every),
        share=estimate(lambda m, t, r: 100 * abs((m - t) / (t - r)), clear),
    )


@dataclass(frozen=True)
class ErrorSpread:
    """How the errors of C cells are spread, and how large they are beside what prompts differ in.

    under: share of errors at most the threshold, in percent. median: of the errors. deviation:
        standard deviation of the target's scores over prompts, mean over cells. median_percent: the
        median error in percent of it (the paper's "20 % of its standard deviation").
    """

    under: Estimate
    median: Estimate
    deviation: float
    median_percent: Estimate


def error_spread(
    model: Array, target: Array, threshold: float | Array, seed: int = 0
) -> ErrorSpread:
    """Spread of the absolute approximation errors. model, target: (P, C), a row a prompt.
    threshold: one, or one a cell (C,)."""
    cells = model.shape[1]
    values = np.concatenate([model, target], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        present = (~np.isnan(target)).sum(axis=0)
        centred = target - np.where(present > 0, np.nansum(target, axis=0) / present, np.nan)
        deviation = float(np.nanmean(np.sqrt(np.nansum(centred**2, axis=0) / (present - 1))))

    def estimate(statistic: Callable[[Array], Array]) -> Estimate:
        return paired_bootstrap(
            values, lambda means: statistic(abs(means[..., :cells] - means[..., cells:])), seed
        )

    return ErrorSpread(
        under=estimate(lambda errors: 100 * (errors <= threshold).mean(axis=-1)),
        median=estimate(lambda errors: np.median(errors, axis=-1)),
        deviation=deviation,
        median_percent=estimate(lambda errors: 100 * np.median(errors, axis=-1) / deviation),
    )
