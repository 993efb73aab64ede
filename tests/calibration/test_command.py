"""`deradiff calibrate`: from an anchor and pairs to a table, a figure, a card and a sentence."""

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest

from configs.tracking import TrackingConfig
from deradiff.anchors.anchor import load_anchor, read_card, write_card
from deradiff.anchors.beta_maps import PreferenceMap
from deradiff.calibration.calibrate import calibrate
from deradiff.calibration.figure import loss_over_lambda
from sample import calibration
from sample.announce import announcement, calibrated
from sample.calibrate_config import CalibrateConfig
from sample.calibration import run
from sample.config import SampleConfig
from sample.resolve import resolve

SETTINGS = {"count": 6, "draws": 2, "batch_size": 3, "tracking": TrackingConfig(kind="none")}


@pytest.fixture
def anchor(worlds, tmp_path):
    """A copy of an anchor's folder, which a test may write into."""
    source = worlds["sd15"].anchors["lora1"]
    folder = tmp_path / "runs" / "train" / "mine" / "anchor"
    shutil.copytree(source, folder)
    (folder / "README.md").write_text("# Mine\n\n## Cost\n\nnothing\n")
    return folder


@pytest.fixture
def config(anchor, pairs, bases, tmp_path):
    """A small calibration on the tiny pipeline."""
    found = CalibrateConfig(anchor=str(anchor), runs=str(tmp_path / "runs"), **SETTINGS)
    found.model.base = str(bases("sd15"))
    found.pairs = pairs.path
    return found


def test_it_leaves_table_figure_card_and_sentence(config, anchor, tmp_path, capsys):
    run_dir = tmp_path / "runs" / "calibrate" / config.run_name()
    before = load_anchor(str(anchor))
    run(config, run_dir)
    out = capsys.readouterr().out
    assert config.run_name() == "mine"
    assert "6 pairs x 2 images x 2 draws: 24 evaluations of each of 2 networks" in out
    assert "beta_eff will be known to about" in out
    assert "trained at beta 2000, acts like" in out

    table = pd.read_csv(run_dir / "calibration.csv")
    assert {"beta", "lam", "loss", "loss_low", "accuracy", "winner_error"} <= set(table)
    for ending in ("svg", "pdf", "png"):
        assert (run_dir / f"held_out_loss.{ending}").stat().st_size > 1000
    stated = json.loads((run_dir / "calibration.json").read_text())[str(anchor)]

    # The card has it, and the anchor is the one that it was.
    card = read_card(anchor)
    assert card.calibration == pytest.approx(stated)
    assert card.calibration["pairs"] == 6
    after = load_anchor(str(anchor))
    after.check_weights()
    assert before.card == after.card
    readme = (anchor / "README.md").read_text()
    assert readme.count("## Calibration") == 1
    assert readme.startswith("# Mine\n\n## Cost")
    assert "On 6 pairs that it was not trained on: this anchor, trained at beta 2000" in readme

    # A second time the README still has one such section.
    run(config, run_dir)
    assert (anchor / "README.md").read_text() == readme


def test_targets_by_preference_are_read_off_the_card(config, anchor, bases, tmp_path):
    sampled = SampleConfig(anchor=str(anchor), lambdas=[0.0, 1.0], targets_by="preference")
    sampled.model.base = str(bases("sd15"))
    sampled.prompts = ["a fox"]
    with pytest.raises(ValueError, match=r"type python -m deradiff calibrate anchor="):
        resolve(replace(sampled, targets=[3000.0]))

    run(config, tmp_path / "run")
    resolved, base, anchors = resolve(replace(sampled, targets=[3000.0]))
    (own,) = set(resolved.lambdas) - {0.0, 1.0}
    assert own == pytest.approx(PreferenceMap(anchors[0]).lam_of(3000.0))
    assert own != pytest.approx(2000 / 3000)
    lines = announcement(resolved, base, anchors, 1, "cpu")
    assert any(f"lam {own:g}" in line and "3000" in line for line in lines)
    assert any(line.endswith(", by preference") for line in lines)
    assert "preference" in resolved.run_name()


def test_the_card_is_left_alone_where_that_is_asked(config, anchor, tmp_path):
    run(replace(config, on_card=False), tmp_path / "run")
    assert read_card(anchor).calibration is None
    assert "Calibration" not in (anchor / "README.md").read_text()


def test_mistakes_are_refused_before_a_weight_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "calibrate", lambda *args, **options: pytest.fail("began"))
    without = replace(config, pairs=None)
    with pytest.raises(ValueError, match="give pairs=<pairs that the anchor was not trained on>"):
        run(without, tmp_path / "run")
    for changes, said in [
        ({"count": 1}, "count must be at least 2 pairs, not 1"),
        ({"draws": 0}, "draws must be above 0"),
        ({"betas": [-5.0]}, "a beta of betas must be above 0"),
        ({"reward": "shiny"}, "reward must be one of vivid, crisp"),
        ({"anchor": []}, "anchor must be a path or hub id, or a list"),
    ]:
        with pytest.raises(ValueError, match=said):
            replace(config, **changes)


def test_sampling_says_what_the_card_knows(anchor):
    known = load_anchor(str(anchor))
    assert calibrated(known) == ""
    numbers = {"pairs": 512.0}
    for name, value in (("beta_eff", 1040.0), ("best_lam", 0.1)):
        numbers |= {name: value, f"{name}_low": 0.9 * value, f"{name}_high": 1.1 * value}
    weights = anchor / known.weights
    write_card(anchor, replace(read_card(anchor), calibration=numbers), weights)
    assert calibrated(load_anchor(str(anchor))) == (
        f"sample: on 512 held-out pairs {anchor} acts like beta 1,040 [936, 1,144], and lam 0.1 "
        "[0.09, 0.11] has the lowest loss at its own beta"
    )


def test_the_figure_has_a_panel_for_each_anchor_and_a_line_for_each_beta(worlds, pairs):
    world = worlds["sd15"].copy()
    anchors = [world.anchors["lora1"], world.anchors["full1"]]
    found = calibrate(world.pipe, anchors, pairs, count=6, draws=1, progress=False)
    figure = loss_over_lambda(found, [500.0, 1000.0])
    assert len(figure.axes) == 2
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["beta 500", "beta 1000", "beta 2000 (its own)"]
