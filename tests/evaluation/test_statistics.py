"""Statistics against closed forms, scipy, and biases that were planted."""

import numpy as np
import pytest
from scipy import stats

from deradiff.evaluation.statistics import (
    Estimate,
    approximation_error,
    error_spread,
    mean_approximation_error,
    paired_bootstrap,
    share_of_anchor,
)


def mean(column):
    return lambda means: means[..., column]


def test_the_interval_of_a_mean_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).gamma(2.0, size=60)
    ours = paired_bootstrap(values[:, None], mean(0))
    assert ours.value == pytest.approx(values.mean(), abs=1e-12)

    # 5 % instead of 2.5 % would move an end by 0.05
    result = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=2)
    theirs = result.confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.025)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(3)
    found = [paired_bootstrap(rng.normal(2.0, 1.0, size=(50, 1)), mean(0)) for _ in range(300)]
    assert 0.90 <= np.mean([e.low <= 2.0 <= e.high for e in found]) <= 0.98


def test_pairing_takes_out_what_prompts_differ_in():
    rng = np.random.default_rng(4)
    height = rng.normal(0, 10, 80)  # prompts differ by a hundred times the effect
    values = np.stack([height + 0.1 + rng.normal(0, 0.05, 80), height], axis=1)
    paired = paired_bootstrap(values, lambda m: m[..., 0] - m[..., 1])
    alone = paired_bootstrap(values, mean(0))
    assert 0.08 < paired.low < 0.1 < paired.high < 0.12
    assert alone.high - alone.low > 1


def test_it_is_the_same_every_time_and_depends_on_its_seed():
    values = np.random.default_rng(5).normal(size=(30, 1))
    assert paired_bootstrap(values, mean(0)) == paired_bootstrap(values, mean(0))
    assert paired_bootstrap(values, mean(0)).low != paired_bootstrap(values, mean(0), seed=1).low


def test_a_nan_is_left_out_of_its_own_column_alone():
    values = np.array([[1.0, 4.0], [3.0, np.nan], [5.0, 8.0]])
    assert paired_bootstrap(values, mean(0)).value == 3
    assert paired_bootstrap(values, mean(1)).value == 6


def test_one_prompt_has_no_interval_and_none_is_refused():
    assert np.isnan(paired_bootstrap(np.ones((1, 1)), mean(0)).low)
    with pytest.raises(ValueError, match="at least one prompt"):
        paired_bootstrap(np.ones((0, 1)), mean(0))


def test_the_absolute_value_keeps_zero_inside():
    assert Estimate(-1.0, -3.0, 2.0).absolute() == Estimate(1.0, 0.0, 3.0)
    assert Estimate(-2.0, -3.0, -1.0).absolute() == Estimate(2.0, 1.0, 3.0)
    assert np.isnan(Estimate(-2.0, np.nan, np.nan).absolute().high)


@pytest.mark.parametrize("bias", [-0.05, 0.03])
def test_a_planted_bias_is_found_in_every_unit(bias):
    rng = np.random.default_rng(6)
    reference = rng.normal(20.0, 3.0, 200)
    target = reference + 0.5 + rng.normal(0, 0.02, 200)
    found = approximation_error(target + bias + rng.normal(0, 0.02, 200), target, reference)
    assert found.difference.value == pytest.approx(bias, abs=0.005)
    assert found.error.value == pytest.approx(abs(bias), abs=0.005)
    assert found.percent_of_mean.value == pytest.approx(100 * abs(bias) / target.mean(), rel=0.15)
    assert found.share.value == pytest.approx(100 * abs(bias) / 0.5, rel=0.15)
    assert found.share.low < 100 * abs(bias) / 0.5 < found.share.high
    assert found.distance.value == pytest.approx(0.5, abs=0.01)
    assert found.distance_is_clear


def test_the_share_of_the_anchor_has_one_unit_for_all_targets():
    reference = np.random.default_rng(3).normal(size=40)
    found = share_of_anchor(reference + 0.35, reference + 0.25, reference + 1.0, reference)
    assert (found.value, found.low, found.high) == pytest.approx((10, 10, 10))

    # An anchor that changed nothing is no unit
    noise = np.random.default_rng(4).normal(size=40)
    assert np.isnan(share_of_anchor(noise, reference, noise, reference).value)


def test_the_share_is_0_for_the_target_and_100_for_the_reference():
    rng = np.random.default_rng(7)
    target = rng.normal(1, 0.1, 40)
    reference = rng.normal(0, 0.1, 40)
    assert approximation_error(target, target, reference).share == Estimate(0, 0, 0)
    share = approximation_error(reference, target, reference).share
    assert (share.value, share.high) == pytest.approx((100, 100))


def test_a_distance_within_its_noise_is_not_clear():
    rng = np.random.default_rng(8)
    reference = rng.normal(0, 1, 50)
    target = reference + rng.normal(0.001, 0.1, 50)
    assert not approximation_error(reference, target, reference).distance_is_clear


def test_the_mean_over_cells_is_of_absolute_errors():
    reference = np.random.default_rng(9).normal(10, 1, (30, 3))
    distance = np.array([1.0, 2.0, 4.0])
    target = reference + distance
    model = target + np.array([0.1, -0.1, 0.4])  # signs that would cancel
    found = mean_approximation_error(model, target, reference, np.array([True, True, False]))
    assert found.error.value == pytest.approx(0.2)
    assert found.share.value == pytest.approx((10 + 5) / 2)  # a cell that is not clear is left out
    percent = 100 * np.mean([0.1, 0.1, 0.4] / target.mean(0))
    assert found.percent_of_mean.value == pytest.approx(percent)
    without_clear = mean_approximation_error(model, target, reference, np.zeros(3, bool))
    assert np.isnan(without_clear.share.value)


def test_the_spread_of_errors_beside_what_prompts_differ_in():
    target = np.random.default_rng(10).normal(5, 2, (50, 4))
    errors = np.array([0.1, -0.2, 0.3, -0.8])
    found = error_spread(target + errors, target, 0.25)
    deviation = target.std(axis=0, ddof=1).mean()
    assert (found.under.value, found.under.low, found.under.high) == (50, 50, 50)
    assert found.median == Estimate(*[pytest.approx(0.25)] * 3)
    assert found.deviation == pytest.approx(deviation)
    assert found.median_percent.value == pytest.approx(100 * 0.25 / deviation)

    # A threshold for each cell, and scores with holes
    thresholds = np.array([0.2, 0.1, 0.31, 0.7])
    assert error_spread(target + errors, target, thresholds).under.value == 50
    holes = np.vstack([np.c_[target[:, :1], target[:, 1:]], [[np.nan, 1.0, 1.0, 1.0]]])
    assert error_spread(holes + errors, holes, 0.25).median.value == pytest.approx(0.25)
