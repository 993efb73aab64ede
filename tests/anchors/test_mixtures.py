"""Several anchors as one: names, shares, and the model that a mixture imitates."""

import math

import pytest

from deradiff.anchors.mixtures import (
    as_one_anchor,
    mixed_beta,
    mixed_reward,
    mixture_name,
    parts_of,
)

A = "runs/train/a/anchor"
B = "runs/train/b + c/anchor"


def test_a_mixture_is_one_anchor_in_its_shares():
    model = as_one_anchor([A, B], [0.2, 0.6])
    assert model.lam == 0.8
    assert model.shares == {A: 0.25, B: 0.75}
    assert model.anchor == f"0.25 {A} + 0.75 {B}"
    assert not model.is_anchor


@pytest.mark.parametrize(
    ("lams", "expected"),
    [
        ((0.0, 0.0), (A, 0.0, None)),
        ((0.5, 0.0), (A, 0.5, None)),
        ((0.0, 1.0), (B, 1.0, None)),
    ],
)
def test_a_mixture_of_less_than_two_anchors_is_none(lams, expected):
    model = as_one_anchor([A, B], lams)
    assert tuple(model) == expected
    assert model.is_anchor == (1.0 in lams)


def test_lambdas_that_add_up_to_1_are_at_lam_1():
    """0.7 + 0.2 + 0.1 is 0.9999999999999999 in floating point."""
    assert as_one_anchor(["a", "b", "c"], [0.7, 0.2, 0.1]).lam == 1


def test_an_anchor_may_be_subtracted():
    model = as_one_anchor([A, B], [1.0, -0.5])
    assert model.lam == 1.5
    assert model.shares == pytest.approx({A: 2 / 3, B: -1 / 3})
    assert model.anchor == f"0.6667 {A} + -0.3333 {B}"
    assert mixed_beta(model.shares, {A: 500.0, B: 500.0}) is None


def test_the_parts_of_a_name_are_read_back():
    shares = {"a/x": 0.25, "org/b": 0.75}
    assert parts_of(mixture_name(shares)) == [("0.25", "a/x"), ("0.75", "org/b")]
    assert parts_of("runs/train/a/anchor") is None
    assert parts_of("runs/train/a + b/anchor") is None


def test_a_mixture_imitates_the_mixed_reward():
    """sum lambda_i r_i / beta_i, as exponent of the reference: of any rewards at any point."""
    betas = {"a": 500.0, "b": 2000.0}
    rewards = {"a": {"vivid": 1.0}, "b": {"vivid": 0.2, "crisp": 0.8}}
    lams = {"a": 0.3, "b": 0.9}
    model = as_one_anchor(list(lams), list(lams.values()))
    strengths = mixed_reward(model.shares, betas, rewards)

    vivid, crisp = 0.7, -1.3
    by_hand = lams["a"] * vivid / 500 + lams["b"] * (0.2 * vivid + 0.8 * crisp) / 2000
    mixed = model.lam * (strengths["vivid"] * vivid + strengths["crisp"] * crisp)
    assert math.isclose(mixed, by_hand)
    assert math.isclose(mixed_beta(model.shares, betas), 1 / (0.25 / 500 + 0.75 / 2000))


def test_what_is_unknown_stays_unknown():
    shares = {"a": 0.5, "b": 0.5}
    assert mixed_beta(shares, {"a": 500.0}) is None
    assert mixed_reward(shares, {"a": 1.0, "b": 1.0}, {"a": {"vivid": 1.0}}) is None
