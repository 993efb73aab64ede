"""Equivalence tests, win rates, limits of agreement and distributions against scipy, closed forms
and simulated studies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from deradiff.evaluation.agreement import (
    equivalence,
    error_ecdf,
    limits_of_agreement,
    win_rate,
    win_share,
)

STUDIES = 1000
PROMPTS = 40
MARGIN = 0.1


def is_at_level(rejected: int, nominal: float = 0.05) -> bool:
    """Whether so many of 1000 rejections may come from a test of at most this level.

    They may where they lie within the binomial's 99.9 %.
    """
    return rejected <= stats.binom.ppf(0.999, STUDIES, nominal)


def test_equivalence_is_two_one_sided_t_tests():
    difference = np.random.default_rng(0).normal(0.02, 0.3, PROMPTS)
    lower = stats.ttest_1samp(difference, -MARGIN, alternative="greater").pvalue
    upper = stats.ttest_1samp(difference, MARGIN, alternative="less").pvalue
    test = equivalence(difference, MARGIN)
    assert test.p == pytest.approx(max(lower, upper), rel=1e-12)
    interval = stats.ttest_1samp(difference, 0).confidence_interval(0.9)
    assert (test.low, test.high) == pytest.approx((interval.low, interval.high))
    assert test.equivalent == (interval.low > -MARGIN and interval.high < MARGIN)
    assert equivalence(-difference, MARGIN).p == pytest.approx(test.p)  # neither side is preferred


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_true_difference_of_the_margin_is_called_equivalent_in_5_studies_of_100_at_most(sign):
    draws = np.random.default_rng(1).normal(sign * MARGIN, 0.2, (STUDIES, PROMPTS))
    rejected = sum(equivalence(d, MARGIN).equivalent for d in draws)
    assert (
        is_at_level(rejected) and rejected > 20
    )  # nor is it needlessly strict at the margin itself


def test_a_planted_bias_is_not_called_equivalent_and_a_planted_zero_is():
    rng = np.random.default_rng(2)
    biased = rng.normal(2 * MARGIN, 0.2, (STUDIES, PROMPTS))
    unbiased = rng.normal(0, 0.1, (STUDIES, PROMPTS))
    beyond = sum(equivalence(difference, MARGIN).equivalent for difference in biased)
    zero = sum(equivalence(difference, MARGIN).equivalent for difference in unbiased)
    assert beyond <= 1 and zero > 0.99 * STUDIES


@pytest.mark.parametrize("distance", [0.0, 0.05, 1.0, -1.0])
def test_a_measured_margin_keeps_the_level_even_where_the_distance_is_noise(distance):
    """Margin: a fifth of a distance that each study measures anew. The truth: a difference of
    exactly that fifth."""
    rng = np.random.default_rng(3)
    distances = rng.normal(distance, 0.5, (STUDIES, PROMPTS))
    differences = rng.normal(abs(distance) / 5, 0.01, (STUDIES, PROMPTS))
    studies = zip(differences, distances)
    rejected = sum(equivalence(own, margin / 5).equivalent for own, margin in studies)
    assert is_at_level(rejected)


def test_a_measured_margin_finds_what_is_equivalent_whatever_the_distances_sign():
    rng = np.random.default_rng(4)
    for distance in (1.0, -1.0):
        margins = rng.normal(distance, 0.1, PROMPTS) / 5
        assert equivalence(rng.normal(0.02, 0.05, PROMPTS), margins).equivalent
        assert not equivalence(rng.normal(0.25, 0.05, PROMPTS), margins).equivalent
    constant = np.full(9, 0.01)
    assert equivalence(constant, 0.1).p == equivalence(constant, np.full(9, 0.1)).p == 0


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
    rate = win_rate(model, np.zeros(trials))
    wilson = stats.binomtest(wins, trials).proportion_ci(method="wilson")
    expected = (100 * wins / trials, 100 * wilson.low, 100 * wilson.high)
    assert (rate.value, rate.low, rate.high) == pytest.approx(expected)


def test_ties_count_half_and_holes_not_at_all():
    model = np.array([1.0, 2, 3, np.nan])
    other = np.array([1.0, 1, 5, 0])
    assert win_rate(model, other).value == pytest.approx(50)
    assert win_share(np.array([0.5, 1.0])).value == 75
    with pytest.raises(ValueError, match="at least one prompt"):
        win_rate(np.array([np.nan]), np.array([1.0]))


def test_win_shares_of_several_seeds_are_covered():
    rng = np.random.default_rng(6)
    rates = rng.beta(2, 1, (STUDIES, PROMPTS))  # of each prompt; their mean is 2/3
    shares = [win_share(rng.binomial(3, rate) / 3) for rate in rates]
    assert np.mean([share.low <= 200 / 3 <= share.high for share in shares]) > 0.94


def test_limits_of_agreement_are_bland_and_altmans_and_cover():
    values = np.random.default_rng(7).normal(2, 3, 500)
    limits = limits_of_agreement(np.append(values, np.nan))
    deviation = values.std(ddof=1)
    assert limits.deviation == pytest.approx(deviation)
    assert limits.bias.value == pytest.approx(values.mean())
    assert limits.upper.value == pytest.approx(values.mean() + 1.959964 * deviation)

    # Their own approximation of 1999
    approximate = 1.96 * deviation * np.sqrt(1 / 500 + 1.96**2 / (2 * 499))
    assert limits.upper.high - limits.upper.value == pytest.approx(approximate, rel=0.06)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (limits.bias.low, limits.bias.high) == pytest.approx((interval.low, interval.high))

    # The intervals cover the truth with few values, too, where approximations fail
    draws = np.random.default_rng(8).normal(0, 1, (STUDIES, 8))
    studies = [limits_of_agreement(values) for values in draws]
    for name, truth in (("lower", -1.959964), ("upper", 1.959964)):
        estimates = [getattr(study, name) for study in studies]
        covered = sum(estimate.low <= truth <= estimate.high for estimate in estimates)
        assert 0.93 * STUDIES < covered < 0.97 * STUDIES
    with pytest.raises(ValueError, match="at least two"):
        limits_of_agreement(np.array([1.0, np.nan]))


def test_the_errors_distribution_is_of_means_and_its_band_of_prompts():
    rng = np.random.default_rng(10)
    target = rng.normal(0, 1, (200, 3))
    planted = np.array([0.1, -0.2, 0.4])
    exact = error_ecdf(target + planted, target)
    assert np.allclose(exact.x, [0.1, 0.2, 0.4]) and np.allclose(exact.share, [1 / 3, 2 / 3, 1])
    noisy = error_ecdf(target + planted + rng.normal(0, 1.0, (200, 3)), target)
    assert (noisy.low <= noisy.share).all() and (noisy.share <= noisy.high).all()
    assert (noisy.high - noisy.low).max() > 0.3

    # Between its steps, too
    between = error_ecdf(target + planted, target, at=np.array([0, 0.3, 9]))
    assert np.allclose(between.x, [0, 0.1, 0.2, 0.3, 0.4, 9])
    assert np.allclose(between.share, [0, 1 / 3, 2 / 3, 2 / 3, 1, 1])
