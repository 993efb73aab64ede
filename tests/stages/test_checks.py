"""Numbers and names that no run can have are refused by their key."""

import pytest

from configs import checks
from configs.checks import at_most, check_run_name, check_seed, not_negative, positive


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (0, "x must be above 0, not 0"),
        (float("nan"), "x must be a finite number, not nan"),
        (float("inf"), "x must be a finite number, not inf"),
        (10**15, "x must be at most 2147483648, not 1000000000000000"),
    ],
)
def test_what_cannot_be_computed_with_is_refused(value, sentence):
    with pytest.raises(ValueError, match=sentence):
        positive("x", value)


def test_what_can_be_is_not():
    positive("x", 1e300)
    not_negative("x", 0)
    at_most("x", 1.0, 1.0)
    with pytest.raises(ValueError, match="x must be at most 1, not 2"):
        at_most("x", 2, 1.0)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "a", None])
def test_a_seed_is_one_of_torchs_generators(seed):
    check_seed("seed", 2**63 - 1)
    with pytest.raises(ValueError, match="seed must be a whole number of at least 0, below 2"):
        check_seed("seed", seed)


def test_a_run_has_a_folder():
    check_run_name("a/b", "runs")
    check_run_name("é" * (checks.LONGEST_NAME // 2), ".")
    for name in ("é" * checks.LONGEST_NAME, " ", ""):
        with pytest.raises(ValueError, match="is no folder below the runs"):
            check_run_name(name, "runs")
    with pytest.raises(ValueError, match="runs is empty: give runs=<folder>"):
        check_run_name("a", "")
