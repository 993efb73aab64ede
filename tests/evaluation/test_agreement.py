"""Equivalence tests, win rates, limits of agreement and distributions against scipy, closed forms
and simulated studies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from deradiff.evaluation.agreement import (
    ecdf,
    equivalence,
    error_ecdf,
    limits_of_agreement,
    win_rate,
    win_share,
)

STUDIES, PROMPTS, MARGIN = 1000, 40, 0.1


def level(rejected: int, nominal: float = 0.05) -> bool:
    """Whether so many of 1000 rejections may come from a test of at most this level: within the
    binomial's 99.9 %."""
    return rejected <= stats.binom.ppf(0.999, STUDIES, nominal)


def test_equivalence_is_two_one_sided_t_tests():
    difference = np.random.default_rng(0).normal(0.02, 0.3, PROMPTS)
    lower = stats.ttest_1samp(difference, -MARGIN, alternative="greater").pvalue
    upper = stats.ttest_1samp(difference, MARGIN, alternative="less").pvalue
    found = equivalence(difference, MARGIN)
    assert found.p == pytest.approx(max(lower, upper), rel=1e-12)
    interval = stats.ttest_1samp(difference, 0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.equivalent == (interval.low > -MARGIN and interval.high < MARGIN)
    assert equivalence(-difference, MARGIN).p == pytest.approx(found.p)  # neither side is preferred


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_true_difference_of_the_margin_is_called_equivalent_in_5_studies_of_100_at_most(sign):
    draws = np.random.default_rng(1).normal(sign * MARGIN, 0.2, (STUDIES, PROMPTS))
    rejected = sum(equivalence(d, MARGIN).equivalent for d in draws)
    assert level(rejected) and rejected > 20  # nor is it needlessly strict at the margin itself


def test_a_planted_bias_is_not_called_equivalent_and_a_planted_zero_is():
    rng = np.random.default_rng(2)
    beyond = sum(
        equivalence(d, MARGIN).equivalent for d in rng.normal(2 * MARGIN, 0.2, (STUDIES, PROMPTS))
    )
    zero = sum(equivalence(d, MARGIN).equivalent for d in rng.normal(0, 0.1, (STUDIES, PROMPTS)))
    assert beyond <= 1 and zero > 0.99 * STUDIES


@pytest.mark.parametrize("distance", [0.0, 0.05, 1.0, -1.0])
def test_a_measured_margin_keeps_the_level_even_where_the_distance_is_noise(distance):
    """Margin: a fifth of a distance that each study measures anew. The truth: a difference of
    exactly that fifth."""
    rng = np.random.default_rng(3)
    distances = rng.normal(distance, 0.5, (STUDIES, PROMPTS))
    differences = rng.normal(abs(distance) / 5, 0.01, (STUDIES, PROMPTS))
    assert level(sum(equivalence(d, m / 5).equivalent for d, m in zip(differences, distances)))


def test_a_measured_margin_finds_what_is_equivalent_whatever_the_distances_sign():
    rng = np.random.default_rng(4)
    for distance in (1.0, -1.0):
        margins = rng.normal(distance, 0.1, PROMPTS) / 5
        assert equivalence(rng.normal(0.02, 0.05, PROMPTS), margins).equivalent
        assert not equivalence(rng.normal(0.25, 0.05, PROMPTS), margins).equivalent
    assert (
        equivalence(np.full(9, 0.01), 0.1).p
        == equivalence(np.full(9, 0.01), np.full(9, 0.1)).p
        == 0
    )


def test_equivalence_of_the_same_images_of_one_prompt_and_of_holes():
    assert equivalence(np.zeros(5), MARGIN).equivalent
    assert not equivalence(np.full(5, MARGIN), MARGIN).equivalent  # on the margin is not within it
    one = equivalence(np.zeros(1), MARGIN)
    assert np.isnan(one.p) and not one.equivalent
    difference = np.random.default_rng(5).normal(0, 0.1, 20)
    assert equivalence(np.append(difference, np.nan), MARGIN) == equivalence(difference, MARGIN)
    for margin in (0.0, -1.0):
        with pytest.raises(ValueError, match="above 0"):
            equivalence(difference, margin)


@pytest.mark.parametrize(("wins", "trials"), [(0, 12), (7, 12), (12, 12), (53, 90)])
def test_win_rates_have_wilsons_interval(wins, trials):
    model = np.r_[np.ones(wins), -np.ones(trials - wins)]
    found, wilson = (
        win_rate(model, np.zeros(trials)),
        stats.binomtest(wins, trials).proportion_ci(method="wilson"),
    )
    assert (found.value, found.low, found.high) == pytest.approx(
        (100 * wins / trials, 100 * wilson.low, 100 * wilson.high)
    )


def test_ties_count_half_and_holes_not_at_all():
    assert win_rate(np.array([1.0, 2, 3, np.nan]), np.array([1.0, 1, 5, 0])).value == pytest.approx(
        50
    )
    assert win_share(np.array([0.5, 1.0])).value == 75
    with pytest.raises(ValueError, match="at least one prompt"):
        win_rate(np.array([np.nan]), np.array([1.0]))


def test_win_shares_of_several_seeds_are_covered():
    rng = np.random.default_rng(6)
    rates = rng.beta(2, 1, (STUDIES, PROMPTS))  # of each prompt; their mean is 2/3
    found = [win_share(rng.binomial(3, r) / 3) for r in rates]
    assert np.mean([e.low <= 200 / 3 <= e.high for e in found]) > 0.94


def test_limits_of_agreement_are_bland_and_altmans_and_cover():
    values = np.random.default_rng(7).normal(2, 3, 500)
    found = limits_of_agreement(np.append(values, np.nan))
    deviation = values.std(ddof=1)
    assert found.deviation == pytest.approx(deviation) and found.bias.value == pytest.approx(
        values.mean()
    )
    assert found.upper.value == pytest.approx(values.mean() + 1.959964 * deviation)
    approximate = (
        1.96 * deviation * np.sqrt(1 / 500 + 1.96**2 / (2 * 499))
    )  # their own approximation of 1999
    assert found.upper.high - found.upper.value == pytest.approx(approximate, rel=0.06)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.bias.low, found.bias.high) == pytest.approx((interval.low, interval.high))
    draws = np.random.default_rng(8).normal(0, 1, (STUDIES, 8))  # few: where approximations fail
    few = [limits_of_agreement(d) for d in draws]
    for limit, truth in (("lower", -1.959964), ("upper", 1.959964)):
        covered = sum(getattr(f, limit).low <= truth <= getattr(f, limit).high for f in few)
        assert 0.93 * STUDIES < covered < 0.97 * STUDIES
    with pytest.raises(ValueError, match="at least two"):
        limits_of_agreement(np.array([1.0, np.nan]))


def test_ecdf_is_scipys_within_the_kolmogorov_smirnov_band():
    values = np.random.default_rng(9).gamma(2, size=60)
    found, theirs = ecdf(np.append(values, np.nan)), stats.ecdf(values).cdf
    assert np.allclose(found.x, theirs.quantiles) and np.allclose(found.share, theirs.probabilities)
    inside = (found.low > 0) & (found.high < 1)
    half = (found.high - found.low)[inside].max() / 2
    assert half == pytest.approx(
        stats.kstwo.ppf(0.95, 60), rel=0.03
    )  # Massart's constant is a little wider than the exact band
    assert found.low.min() >= 0 and found.high.max() <= 1
    with pytest.raises(ValueError, match="at least one"):
        ecdf(np.array([np.nan]))


def test_the_errors_distribution_is_of_means_and_its_band_of_prompts():
    rng = np.random.default_rng(10)
    target = rng.normal(0, 1, (200, 3))
    planted = np.array([0.1, -0.2, 0.4])
    exact = error_ecdf(target + planted, target)
    assert np.allclose(exact.x, [0.1, 0.2, 0.4]) and np.allclose(exact.share, [1 / 3, 2 / 3, 1])
    noisy = error_ecdf(target + planted + rng.normal(0, 1.0, (200, 3)), target)
    assert (
        (noisy.low <= noisy.share).all()
        and (noisy.share <= noisy.high).all()
        and (noisy.high - noisy.low).max() > 0.3
    )
