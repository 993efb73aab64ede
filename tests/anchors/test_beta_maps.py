"""From a beta to lambda by an anchor's card, and back."""

from types import SimpleNamespace

import pytest

from deradiff.anchors.beta_maps import PreferenceMap


def anchor(**points):
    """An anchor whose card knows these points; `b500=2` is lambda 2 at beta 500."""
    calibration = {"pairs": 512.0, "beta_eff": 700.0}
    for name, lam in points.items():
        calibration[f"best_lam_at_{name[1:]}"] = lam
    return SimpleNamespace(source="runs/a", card=SimpleNamespace(calibration=calibration))


def test_points_are_met_and_lines_in_logarithms_lie_between_them():
    found = PreferenceMap(anchor(b500=2.0, b1000=1.0, b4000=0.125))
    assert found.lam_of(500) == pytest.approx(2.0)
    assert found.lam_of(1000) == pytest.approx(1.0)
    assert found.lam_of(2000) == pytest.approx((1.0 * 0.125) ** 0.5)
    for beta in (500, 700, 1000, 3000, 4000):
        assert found.target_of(found.lam_of(beta)) == pytest.approx(beta)
    assert found.target_of(3.0) is None
    assert found.target_of(0.01) is None


def test_a_weaker_alignment_is_never_a_larger_lambda():
    found = PreferenceMap(anchor(b500=1.0, b1000=1.2, b2000=0.5))
    assert found.lam_of(1000) == pytest.approx(1.0)
    assert 0.5 < found.lam_of(1500) < 1.0


def test_what_the_card_does_not_know_is_refused_with_what_to_type():
    found = PreferenceMap(anchor(b500=2.0, b1000=1.0))
    with pytest.raises(ValueError, match="for betas from 500 to 1000, and 5000 is none of them"):
        found.lam_of(5000)
    with pytest.raises(ValueError, match=r"type python -m deradiff calibrate anchor=runs/a pairs="):
        PreferenceMap(anchor(b500=2.0))
    with pytest.raises(ValueError, match="does not say which lambda is best"):
        PreferenceMap(SimpleNamespace(source="a", card=None))
