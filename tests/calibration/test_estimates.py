"""What an anchor is: optima, their intervals, and strengths on the analytic beds."""

import math

import numpy as np
import pytest
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit

from deradiff.calibration.estimates import (
    BETAS,
    LAMS,
    LN_2,
    best_lam,
    crossing,
    effective_beta,
    loss_at_best_lam,
    lowest_lam,
    mean_estimate,
    pair_accuracies,
    pair_losses,
    trajectory_beta,
    winner_errors,
)
from deradiff.worlds.beds import BOUNDED, LIN, QUAD
from tests.support.calibration import bed_moments, population

BETA = 400.0


def test_the_reference_has_ln_two_an_accuracy_of_one_half_and_no_error():
    moments = population(20, seed=0)
    moments.training_weights[:] = np.random.default_rng(0).uniform(0.5, 1.5, (20, 2))
    assert pair_losses(moments, [0.0], BETA) == pytest.approx(np.full(20, LN_2))
    assert pair_accuracies(moments, [0.0]) == pytest.approx(np.full(20, 0.5))
    assert winner_errors(moments, [0.0]) == pytest.approx(np.zeros(20))


def test_losses_weigh_the_draws_of_a_pair():
    moments = population(6, seed=0)
    moments.training_weights[:] = [1.6, 0.4]
    margins = moments.margins([0.7], BETA)
    losses = np.log1p(np.exp(-margins))
    weights = np.array([0.8, 0.2])
    expected = losses @ weights
    assert pair_losses(moments, [0.7], BETA) == pytest.approx(expected)
    is_right = (margins > 0).astype(float)
    assert pair_accuracies(moments, [0.7]) == pytest.approx(is_right @ weights)


def test_the_best_lambda_is_the_minimum_of_the_loss():
    moments = population(300, seed=1)
    found = best_lam(moments, BETA)
    direct = minimize_scalar(
        lambda lam: pair_losses(moments, [lam], BETA).mean(), bounds=(0.01, 10), method="bounded"
    )
    assert found.value == pytest.approx(direct.x, rel=1e-3)
    assert found.low < found.value < found.high
    # At half of the strength, lambda is twice as large.
    assert best_lam(population(300, seed=1, gain=0.5), BETA).value > found.value


def test_an_anchor_acts_like_the_beta_at_which_it_is_its_own_best_lambda():
    moments = population(300, seed=1)
    beta = effective_beta(moments).value
    assert best_lam(moments, beta).value == pytest.approx(1, abs=0.005)
    # Of the loss as a function of beta: the labels' most likely temperature.
    direct = brentq(lambda b: _slope_in_beta(moments, b), 1, 1e6)
    assert trajectory_beta(moments).value == pytest.approx(direct, rel=1e-3)


def _slope_in_beta(moments, beta):
    margin = moments.margins([1.0], 1.0).mean(axis=1)
    return (margin * expit(-beta * margin)).mean()


def test_an_anchor_that_prefers_losers_is_best_left_out():
    moments = population(200, seed=2)
    moments.projection[:] *= -1
    assert best_lam(moments, BETA).value == 0
    assert effective_beta(moments).value == BETAS[0]
    assert loss_at_best_lam(moments, BETA).value == pytest.approx(LN_2)


def test_the_loss_at_the_best_lambda_is_judged_by_other_pairs_than_chose_it():
    """Of labels that say nothing, the best lambda on the same pairs always seems to gain."""
    optimistic = []
    judged = []
    for seed in range(30):
        moments = population(60, seed=seed)
        coin = np.random.default_rng(seed).random(60) < 0.5
        moments.projection[coin] = moments.projection[coin][:, :, ::-1]
        moments.gram[coin] = moments.gram[coin][:, :, ::-1]
        losses = [pair_losses(moments, [lam], BETA).mean() for lam in LAMS]
        optimistic.append(min(losses))
        judged.append(loss_at_best_lam(moments, BETA).value)
    assert np.mean(optimistic) < LN_2
    assert np.mean(judged) > LN_2


def test_lowest_lambda_between_the_places_and_at_the_ends():
    losses = (np.log(np.maximum(LAMS, 1e-6)) - math.log(0.37)) ** 2
    assert lowest_lam(losses) == pytest.approx(0.37, rel=1e-9)
    assert lowest_lam(LAMS) == 0
    assert lowest_lam(-LAMS) == LAMS[-1]


def test_crossing_between_the_places_and_beyond_the_ends():
    assert crossing(math.log(777.0) - np.log(BETAS)) == pytest.approx(777.0)
    assert crossing(-np.ones(len(BETAS))) == BETAS[0]
    assert crossing(np.ones(len(BETAS))) == pytest.approx(BETAS[-1])


@pytest.mark.parametrize("estimate", [effective_beta, lambda m: best_lam(m, BETA)])
def test_intervals_cover_the_population(estimate):
    truth = estimate(population(3000, seed=999)).value
    hits = 0
    for seed in range(30):
        found = estimate(population(60, seed=seed))
        hits += found.low <= truth <= found.high
    assert hits >= 25  # of 30 at 95 %: fewer are seen three times in a thousand


def test_draws_of_a_pair_are_not_taken_for_pairs():
    """Draws that repeat one another say no more, so the interval is as wide."""
    moments = population(80, seed=3)
    repeated = population(80, seed=3)
    for name in moments.__dataclass_fields__:
        value = getattr(moments, name)
        object.__setattr__(repeated, name, np.concatenate([value] * 5, axis=1))
    one = mean_estimate(pair_losses(moments, [1.0], BETA))
    five = mean_estimate(pair_losses(repeated, [1.0], BETA))
    assert five.high - five.low == pytest.approx(one.high - one.low)


NOISE = {"beta_start": 0.0085, "beta_end": 0.12, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "epsilon": lambda: DDPMScheduler(num_train_timesteps=100, **NOISE, clip_sample=False),
    "v": lambda: DDPMScheduler(
        num_train_timesteps=100, **NOISE, clip_sample=False, prediction_type="v_prediction"
    ),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(num_train_timesteps=100),
}


@pytest.mark.parametrize(
    ("kind", "bed"),
    [
        pytest.param("v", QUAD, id="quad"),
        pytest.param("epsilon", LIN, id="lin", marks=pytest.mark.slow),
        pytest.param("flow", BOUNDED, id="bounded", marks=pytest.mark.slow),
    ],
)
def test_ratios_of_strengths_on_the_analytic_beds(kind, bed):
    """An anchor of twice the strength has half the temperature, by the whole trajectory."""
    strength = bed.strength / 2
    moments = bed_moments(bed, [strength, 2 * strength], SCHEDULERS[kind](), 250, 1500, 2.0)
    ratio = trajectory_beta(moments.of(0)).value / trajectory_beta(moments.of(1)).value
    assert ratio == pytest.approx(2, rel=0.03)
