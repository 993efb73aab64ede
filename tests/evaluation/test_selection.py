"""Choosing lambda: on planted optima, under budgets, and with rewards that are hacked."""

from __future__ import annotations

import numpy as np
import pytest

from deradiff.evaluation.selection import (
    choose,
    choosing_mask,
    prompts_to_tell_apart,
    reward_hacking,
)
from deradiff.evaluation.statistics import paired_bootstrap

LAMBDAS = np.array([0.0, 0.5, 1.0, 2.0, 3.0])
KL = 10 * LAMBDAS**2
IDS = [f"prompt-{i}" for i in range(200)]
NOISE = np.random.default_rng(0).normal(0, 1, (200, 1))


def peaked(best: float, noise: float = 0.05) -> np.ndarray:
    """Scores (200, 5) whose mean is highest at one lambda.

    What prompts differ in is far larger than what lambda does.
    """
    own_noise = np.random.default_rng(1).normal(0, noise, (200, 5))
    return -((LAMBDAS - best) ** 2) + 5 * NOISE + own_noise


def chosen(scores=None, budget=None, reference=None):
    """What is chosen by half of the prompts, of lambdas with the path KL of `KL`."""
    if scores is None:
        scores = peaked(2.0)
    path_kl = np.tile(KL, (200, 1))
    return choose(scores, path_kl, budget, choosing_mask(IDS), reference)


def test_prompts_are_split_by_their_id_alone():
    first = choosing_mask(IDS)
    assert 80 < first.sum() < 120
    shuffled = np.random.default_rng(2).permutation(200)
    assert (choosing_mask([IDS[i] for i in shuffled]) == first[shuffled]).all()
    assert (choosing_mask(IDS[:7]) == first[:7]).all()
    assert choosing_mask(IDS, 0.1).sum() < 40 and choosing_mask(IDS, 1.0).all()
    assert choosing_mask(["\ud800 half a surrogate"]).shape == (1,)


def test_the_best_is_chosen_and_reported_on_other_prompts():
    scores = peaked(2.0)
    found = chosen(scores, reference=scores[:, 0])
    side = choosing_mask(IDS)
    assert found.index == 3 and found.affordable.all()
    assert found.score.value == pytest.approx(scores[~side, 3].mean())
    assert found.choosing_means[3] == pytest.approx(scores[side, 3].mean())
    assert found.gain.value == pytest.approx((scores[~side, 3] - scores[~side, 0]).mean())
    assert found.gain.low < 4 < found.gain.high and found.gain.high - found.gain.low < 0.1  # paired
    assert found.lead.value == pytest.approx(1, abs=0.05) and found.lead.low > 0  # over 1.0 or 3.0


def test_what_was_high_by_chance_is_not_reported_as_high():
    pure = np.random.default_rng(3).normal(0, 1, (200, 200))  # 200 candidates that are all alike
    found = choose(pure, np.zeros((200, 200)), None, choosing_mask(IDS))
    assert found.choosing_means[found.index] > 0.2 and found.score.low < 0 < found.score.high


@pytest.mark.parametrize(("budget", "index"), [(40.0, 3), (39.9, 2), (10, 2), (9, 1), (0, 0)])
def test_the_budget_holds(budget, index):
    found = chosen(budget=budget)
    assert found.index == index and (found.affordable == np.less_equal(KL, budget)).all()


def test_equal_candidates_are_decided_by_path_kl():
    equal = np.tile(NOISE, (1, 5))
    assert chosen(equal).index == 0
    assert chosen(equal).lead.value == 0


def test_a_candidate_without_a_path_kl_is_out_of_any_budget():
    kl = np.tile(KL, (200, 1))
    kl[:, 3] = np.nan
    assert choose(peaked(2.0), kl, 90, choosing_mask(IDS)).index != 3
    assert choose(peaked(2.0), kl, None, choosing_mask(IDS)).index == 3


def test_what_cannot_be_chosen_is_refused():
    with pytest.raises(ValueError, match="within 5 nats; the smallest is 10"):
        choose(peaked(2.0)[:, 2:], np.tile(KL[2:], (200, 1)), 5, choosing_mask(IDS))
    with pytest.raises(ValueError, match="for none was recorded"):
        choose(peaked(2.0), np.full((200, 5), np.nan), 5, choosing_mask(IDS))
    with pytest.raises(ValueError, match="do not make two halves"):
        choose(peaked(2.0), np.zeros((200, 5)), None, np.ones(200, bool))


@pytest.mark.parametrize(("difference", "deviation"), [(0.3, 1.0), (-0.1, 0.25), (0.02, 0.1)])
def test_so_many_prompts_tell_two_apart_in_four_of_five_cases(difference, deviation):
    """New evaluations with half of these prompts find the difference in 80 % of all cases."""
    prompts = prompts_to_tell_apart(difference, deviation)
    rng = np.random.default_rng(5)
    found = 0
    for _ in range(400):
        draws = rng.normal(difference, deviation, (round(prompts / 2), 1))
        estimate = paired_bootstrap(draws, lambda means: means[..., 0])
        found += estimate.low > 0 if difference > 0 else estimate.high < 0
    assert found / 400 == pytest.approx(0.8, abs=0.06)  # three standard errors


def test_how_many_prompts_where_nothing_differs_or_nothing_is_known():
    assert prompts_to_tell_apart(0.0, 1.0) == np.inf
    assert np.isnan(prompts_to_tell_apart(np.nan, 1.0))
    assert np.isnan(prompts_to_tell_apart(1.0, np.nan))


def hacked(falls: float, prompts: int = 100, others: int = 3, seed: int = 4):
    """Scores before and after: the first one rises by 0.5, the others by `falls`."""
    rng = np.random.default_rng(seed)
    before = rng.normal(0, 3, (prompts, 1 + others))
    change = np.r_[0.5, np.full(others, falls)]
    return before, before + change + rng.normal(0, 0.5, before.shape)


def test_the_alarm_is_raised_where_one_rises_and_another_falls():
    alarm = reward_hacking(*hacked(-0.4))
    assert alarm.raised and alarm.fallen == (1, 2, 3)
    assert alarm.rise.value == pytest.approx(0.5, abs=0.2)
    assert not reward_hacking(*hacked(0.4)).raised  # all rise
    before, after = hacked(-0.4)
    assert not reward_hacking(after, before).raised  # the optimised one falls
    assert reward_hacking(before[:, ::-1], after[:, ::-1], optimised=3).fallen == (0, 1, 2)
    assert not reward_hacking(before[:, :1], after[:, :1]).raised  # nothing else to fall


def test_the_alarm_is_not_raised_by_the_number_of_scorers():
    raised = [reward_hacking(*hacked(0.0, others=8, seed=seed)).raised for seed in range(200)]
    assert np.mean(raised) < 0.06  # 8 others at 2.5 % each would make 18 %


def test_prompts_that_one_model_lacks_are_left_out():
    before, after = hacked(-0.4)
    after[0, 1] = np.nan
    change = reward_hacking(before, after).changes[1].value
    assert change == pytest.approx((after - before)[1:, 1].mean())
