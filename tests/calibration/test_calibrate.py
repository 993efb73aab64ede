"""`deradiff.calibrate`, from a pipeline and pairs to sentences."""

import math

import pytest

import deradiff
from deradiff.anchors.anchor import load_anchor
from deradiff.calibration.calibrate import CalibratedAnchor
from deradiff.calibration.estimates import pair_losses
from deradiff.evaluation.statistics import Estimate
from tests.support.calibration import population

SETTINGS = {"count": 6, "draws": 2, "batch_size": 3, "progress": False}


def test_several_anchors_with_their_table_and_sentences(worlds, pairs):
    world = worlds["sd15"].copy()
    anchors = [world.anchors["lora1"], world.anchors["full1"]]
    found = deradiff.calibrate(world.pipe, anchors, pairs, **SETTINGS)
    assert [anchor.beta for anchor in found.anchors] == [2000, 2000]
    assert found.moments.pairs == 6

    table = found.table(lams=[0, 0.5], betas=[500])
    assert len(table) == 2 * 2 * 2  # anchors, betas with their own, lambdas
    reference = table[table["lam"] == 0]
    assert reference["loss"].tolist() == pytest.approx([math.log(2)] * 4)
    row = table[(table["beta"] == 2000) & (table["lam"] == 0.5)].iloc[1]
    expected = pair_losses(found.moments.of(1), [0.5], 2000).mean()
    assert row["loss"] == pytest.approx(expected)
    assert row["loss_low"] < expected < row["loss_high"]
    for anchor, sentence in zip(anchors, found.verdicts):
        assert sentence.startswith(f"{anchor}, trained at beta 2000, ")


def sentence_of(loss, beta=10000.0, beta_eff=1040.0):
    one = CalibratedAnchor(
        name="a",
        beta=beta,
        beta_eff=Estimate(beta_eff, 0.9 * beta_eff, 1.1 * beta_eff),
        trajectory_beta=Estimate(600, 500, 700),
        accuracy=Estimate(0.7, 0.6, 0.8),
        best_lam=Estimate(0.1, 0.08, 0.12),
        loss=loss,
        best_loss=Estimate(0.66, 0.65, 0.67),
        moments=population(2, seed=0),
    )
    return one.verdict


def test_the_verdict_says_what_the_anchor_is():
    assert sentence_of(Estimate(1.25, 1.1, 1.4)) == (
        "a, trained at beta 10000, acts like beta 1,040 [936, 1,144]; at beta 10000 "
        "its held-out loss is 1.25 [1.1, 1.4], worse than the reference's 0.693, and lam = 0.1 "
        "[0.08, 0.12] is best, with 0.66 [0.65, 0.67]."
    )
    assert "better than the reference's" in sentence_of(Estimate(0.62, 0.6, 0.65))
    assert "cannot be told from the reference's" in sentence_of(Estimate(0.7, 0.6, 0.8))
    assert sentence_of(None, beta=None).startswith("a, of unknown beta, acts like beta 1,040")
    assert "lies below" in sentence_of(None, beta=None, beta_eff=1.0)


def test_mistakes_are_refused_in_a_sentence(worlds, pairs):
    world = worlds["sd15"].copy()
    anchor = world.anchors["lora1"]
    with pytest.raises(ValueError, match="count must be at least 2, not 1"):
        deradiff.calibrate(world.pipe, anchor, pairs, count=1)
    with pytest.raises(ValueError, match="draws must be at least 1, not 0"):
        deradiff.calibrate(world.pipe, anchor, pairs, draws=0)
    with pytest.raises(ValueError, match="does not exist"):
        deradiff.calibrate(world.pipe, anchor, "nowhere.parquet")
    with pytest.raises(ValueError, match="is of family sdxl"):
        deradiff.calibrate(world.pipe, worlds["sdxl"].anchors["lora1"], pairs)


def test_an_anchor_of_unknown_beta_has_a_best_lambda_at_any(worlds, pairs):
    world = worlds["sd15"].copy()
    anchor = load_anchor(world.anchors["full1"])
    anchor.card = None
    (found,) = deradiff.calibrate(world.pipe, anchor, pairs, **SETTINGS).anchors
    assert found.beta is None
    assert found.best_lam is None
    assert found.best_lam_at(500.0).value >= 0


def test_an_anchor_that_changes_nothing_is_refused(worlds, pairs):
    world = worlds["sd15"].copy()
    same = worlds["sd15"].copy().denoiser
    with pytest.raises(ValueError, match="gives the reference's outputs on every pair"):
        deradiff.calibrate(world.pipe, same, pairs, **SETTINGS)
