"""The evaluation of mixtures: which models they are compared with, and what is shown."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from deradiff.anchors.anchor import AnchorCard
from deradiff.anchors.mixtures import as_one_anchor, lam_text, short_names
from deradiff.evaluation import (
    compare,
    mixtures_of_anchors,
    score_against_lambda,
    simplex,
    trade_off,
)
from deradiff.evaluation.figures.image_grids import image_grids
from deradiff.evaluation.manifest import read_cards, read_samples
from deradiff.evaluation.pairing import pair_up
from deradiff.evaluation.tables.mixtures import mixtures_verdict
from tests.support.sampled_runs import Colourful, evaluate, read, write_run

BETA = 500.0


def write_anchor_run(root: Path, name: str, reward: dict, strength: float, **options) -> str:
    """A run of an anchor whose card names its reward, at lam 0 and 1.

    Args:
        root: the folder of all runs.
        name: of the training run.
        reward: of the anchor.
        strength: how vivid its images are.
        options: of `write_run`.
    """
    # How vivid images are follows from 1000 lam / beta, so another strength is a shift.
    shift = strength - 1000 / BETA
    run = write_run(root / name, BETA, lambdas=(0.0, 1.0), shift=shift, **options)
    card_file = next((root / name).glob("train/*/anchor/anchor.json"))
    card_file.write_text(json.dumps(json.loads(card_file.read_text()) | {"reward": reward}))
    return run


def write_mixture_run(root: Path, anchors: list[str], points: dict, name: str = "mixture") -> str:
    """A run of several anchors.

    Args:
        root: the folder of all runs.
        anchors: their paths.
        points: how vivid the images are, by lambdas.
        name: of the run.
    """
    folder = root / name
    lines = []
    for lams, strength in points.items():
        model = as_one_anchor(anchors, lams)
        part = root / f"part-{'-'.join(map(str, lams))}"
        run = Path(write_run(part, BETA, lambdas=(0.5,), bias=strength - 500 / BETA))
        for line in (run / "manifest.jsonl").read_text().splitlines():
            record = json.loads(line)
            image = record["image"].replace("lam=0.50", f"lam={','.join(map(str, lams))}")
            (folder / image).parent.mkdir(parents=True, exist_ok=True)
            (run / record["image"]).rename(folder / image)
            own = {
                "image": image,
                "anchor": model.anchor,
                "lam": model.lam,
                "shares": model.shares,
                "beta_target": BETA / model.lam if model.lam else None,
            }
            lines.append(json.dumps(record | own))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    """A mixture of two anchors, and anchors of the mixed reward: the right one, and others."""
    first = write_anchor_run(tmp_path, "vivid", {"vivid": 1.0}, 2.0)
    second = write_anchor_run(tmp_path, "crisp", {"crisp": 1.0}, 0.2)
    half = write_anchor_run(tmp_path, "half", {"vivid": 0.5, "crisp": 0.5}, 1.0)
    quarter = write_anchor_run(tmp_path, "quarter", {"vivid": 0.25, "crisp": 0.75}, 0.5)
    anchors = [
        json.loads((Path(run) / "manifest.jsonl").read_text().split("\n")[0])["anchor"]
        for run in (first, second)
    ]
    points = {(0, 0): 0.0, (1, 0): 2.0, (0.5, 0.5): 1.1, (0.25, 0.75): 0.6, (0, 1): 0.2}
    mixture = write_mixture_run(tmp_path, anchors, points)
    return mixture, [half, quarter], anchors


def pairs_of(mixture, references):
    """What is compared with what."""
    samples = read_samples([mixture], references)
    return pair_up(samples, read_cards(samples))


def test_a_mixture_is_compared_with_the_anchor_of_the_mixed_reward(runs):
    mixture, references, _ = runs
    pairs = pairs_of(mixture, references)
    targets = {cell.realigned.anchor[:4]: cell.target.anchor for cell in pairs.mixtures}
    assert len(targets) == 2
    assert "/half/" in targets["0.5 "]
    assert "/quarter/" in targets["0.25"]
    assert not pairs.cells
    assert not pairs.missing


def test_an_anchor_of_one_reward_is_no_target_of_an_anchor_of_another(tmp_path):
    vivid = write_anchor_run(tmp_path, "vivid", {"vivid": 1.0}, 2.0)
    samples = [write_run(tmp_path / "own", 250.0, lambdas=(0.0, 0.5, 1.0))]
    card_file = next((tmp_path / "own").glob("train/*/anchor/anchor.json"))
    card = json.loads(card_file.read_text())

    # beta / lam is the other's beta in all three
    for reward, count in (({"vivid": 1.0}, 1), ({"crisp": 1.0}, 0), (None, 1)):
        card_file.write_text(json.dumps(card | {"reward": reward}))
        assert len(pairs_of(samples[0], [vivid]).cells) == count


def test_anchors_that_name_no_reward_have_mixtures_without_a_target(runs):
    mixture, references, anchors = runs
    for anchor in anchors:
        file = Path(anchor) / "anchor.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"reward": None}))
    pairs = pairs_of(mixture, references)
    assert not pairs.mixtures
    assert not pairs.missing


def test_the_table_shows_every_point_with_its_target(runs, monkeypatch):
    mixture, references, _ = runs
    monkeypatch.setattr("deradiff.evaluation.scoring.load_spec", lambda spec, device: Colourful())
    comparison = compare([mixture], references, ["vivid"], cache=Path(mixture) / "cache")
    table = mixtures_of_anchors(comparison)
    rows = table.data.set_index("shares")
    assert list(rows.index) == ["1 0", "0.5 0.5", "0.25 0.75", "0 1"]
    assert rows["mean"].is_monotonic_decreasing
    assert list(rows["target"].notna()) == [False, True, True, False]
    half = rows.loc["0.5 0.5"]
    assert half["error"] == pytest.approx(half["mean"] - half["target_mean"])
    assert half["share"] == pytest.approx(100 * half["error"] / half["target_gain"])
    assert "Mixtures: 2 were compared" in mixtures_verdict(table.data)

    # The figure of the line, and no figure of two scores where there is one
    figure = simplex(comparison, table)
    assert figure.axes[0].get_xlabel().startswith("share of ")
    xs = [list(line.get_xdata()) for line in figure.axes[0].lines]
    assert xs == [[0, 0.5, 0.75, 1], [0.5, 0.75]]
    assert trade_off(comparison, table) is None
    assert trade_off(replace(comparison, scorers=["vivid", "vivid"]), table) is not None


def test_a_run_of_several_anchors_is_one_grid(runs):
    mixture, references, _ = runs
    grid = image_grids(read_samples([mixture], references))[0]
    assert [head.lam for head in grid.heads] == ["0, 0", "1, 0", "0.5, 0.5", "0.25, 0.75", "0, 1"]
    assert [head.meaning for head in grid.heads] == [
        "reference",
        "seed0",
        "0.5 seed0 + 0.5 seed0",
        "0.25 seed0 + 0.75 seed0",
        "seed0",
    ]
    assert grid.heading == "Mixtures of anchors"
    assert all(len(line.uris) == 5 for line in grid.lines)


def test_the_report_shows_mixtures_and_no_empty_claim(runs, tmp_path, capsys):
    mixture, references, _ = runs
    run_dir = evaluate(tmp_path, [mixture], draw=True, references=references)
    page = (run_dir / "report.html").read_text()
    assert "Several anchors, mixed" in page
    assert "From one anchor to the other" in page
    assert "No realigned model could be compared" not in page
    assert len(read(run_dir, "mixtures")) == 4
    said = capsys.readouterr().out
    assert "eval: Mixtures: 2 were compared" in said
    assert "Nothing to compare" not in said
    assert "From the reference to the anchor" not in page
    assert "| 0.25, 0.75 |" in (run_dir / "tables/mixtures.md").read_text()
    # A mixture may be chosen as any model may
    assert len(read(run_dir, "selection")) == 5


def test_a_manifest_of_before_has_no_mixtures(tmp_path):
    samples = read_samples([write_run(tmp_path, BETA)])
    assert samples["shares"].isna().all()
    assert isinstance(samples, pd.DataFrame)
    assert AnchorCard(base_model="x", family="sd15", method="lora", beta=1.0).reward is None


def test_betas_of_another_convention_are_not_compared(tmp_path):
    target = write_anchor_run(tmp_path, "vivid", {"vivid": 1.0}, 2.0)
    run = write_run(tmp_path / "own", 250.0, lambdas=(0.0, 0.5, 1.0))
    assert len(pairs_of(run, [target]).cells) == 1
    card_file = next((tmp_path / "own").glob("train/*/anchor/anchor.json"))
    card = json.loads(card_file.read_text())
    card_file.write_text(json.dumps(card | {"beta_convention": "sum"}))
    assert not pairs_of(run, [target]).cells


def test_mixtures_without_a_target_leave_nothing_missing(runs, capsys):
    """Nor do anchors of theirs at other lambdas: nobody asked for targets."""
    mixture, _, _ = runs
    manifest = Path(mixture) / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines:
        if line["shares"] is None and line["lam"] == 1:
            line |= {"lam": 0.5, "beta_target": 2 * BETA}
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not pairs_of(mixture, []).missing


def test_every_anchor_of_a_run_has_its_reference_on_the_curve(runs, monkeypatch):
    mixture, *_ = runs
    monkeypatch.setattr("deradiff.evaluation.scoring.load_spec", lambda spec, device: Colourful())
    comparison = compare([mixture], [], ["vivid"], cache=Path(mixture) / "cache")
    (panel,) = score_against_lambda(comparison).axes
    curves = [list(line.get_xdata()) for line in panel.lines]
    assert curves == [[0, 1], [0, 1]]


def test_names_of_anchors_are_shown_without_what_they_share():
    names = [f"runs/train/sd-dpo-beta{beta}-seed0/anchor" for beta in (500, 1000)]
    assert short_names(names) == ["beta500", "beta1000"]
    assert short_names(names[:1]) == ["sd-dpo-beta500-seed0"]
    assert short_names(["a", "a-crisp"]) == ["a", "a-crisp"]
    assert lam_text(f"0.7 {names[0]} + 0.3 {names[1]}", 1.0) == "0.7, 0.3"
    assert lam_text(names[0], 0.25) == "0.25"
