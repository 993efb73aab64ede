"""Which of two images scorers prefer, and how far they agree."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kendalltau

from deradiff.evaluation.preferences import kendall_tau, pairs_of, preferences, same_preference


def test_every_pair_is_there_once():
    first, second = pairs_of(4)
    pairs = set(zip(first.tolist(), second.tolist()))
    assert pairs == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)} and len(first) == 6
    assert len(pairs_of(1)[0]) == 0


def test_agreement_by_hand():
    """Pairs (0,1), (0,2), (1,2): a says 2 > 1 > 0, b the same with a tie of 1 and 2, c reverse."""
    preferred = preferences(np.array([[0, 0, 9.0], [1, 5, 4.0], [2, 5, 1.0]]))
    assert preferred.tolist() == [[-1, -1, 1], [-1, -1, 1], [-1, 0, 1]]
    same = same_preference(preferred)
    expected = [[1, 2.5 / 3, 0], [2.5 / 3, 2.5 / 3, 0.5 / 3], [0, 0.5 / 3, 1]]
    np.testing.assert_allclose(same, expected)


@pytest.mark.parametrize("levels", [3, 1000])
def test_kendall_s_tau_is_scipy_s_with_ties_and_without(levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, (12, 4)).astype(float)
    tau = kendall_tau(preferences(scores))
    for i in range(4):
        for j in range(4):
            assert tau[i, j] == pytest.approx(kendalltau(scores[:, i], scores[:, j]).statistic)


def test_what_tells_nothing_apart_has_no_tau():
    preferred = preferences(np.array([[1.0, 1.0], [1.0, 2.0]]))
    assert np.isnan(kendall_tau(preferred)[0, 1]) and same_preference(preferred)[0, 1] == 0.5
    assert np.isnan(same_preference(preferences(np.ones((1, 2))))).all()
