"""The tables beside the summary: the paper's measures and numbers, equivalence, win rates, modes,
references, costs."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from deradiff.evaluation.tables.paper import BY_TARGET, MAE
from tests.support.sampled_runs import evaluate, read, write_run

PAPER = {"sampler": "euler_ancestral", "steps": 50, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Anchor 2000 in two modes, beside its targets from scratch.

    In mode exact a realigned model is its target; in mode weights it is far off.
    """
    root = tmp_path_factory.mktemp("tables")
    samples = [
        write_run(root, 2000, prompts=12),
        write_run(root, 2000, mode="weights", lambdas=(0.5,), prompts=8, bias=0.3, every=None),
    ]
    for beta in (1000, 4000, 8000):
        samples.append(write_run(root, beta, lambdas=(0.0, 1.0), prompts=12))
    return evaluate(root, samples, "vivid")


def rewrite_cards(root, base_model):
    """Let every anchor's card name another base model."""
    for file in Path(root).rglob("anchor.json"):
        card = json.loads(file.read_text())
        file.write_text(json.dumps(card | {"base_model": base_model}))


def realigned_within(run_dir):
    """The summary of the realigned models within (0, 1), by mode."""
    rows = read(run_dir, "summary").query("what == 'realigned' and range == '0 < lam < 1'")
    return rows.set_index("mode")


def markdown_rows(run_dir, table):
    """The lines of a table's markdown, as cells."""
    text = (run_dir / "tables" / f"{table}.md").read_text()
    lines = [line for line in text.split("\n") if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines]


def test_a_planted_zero_is_equivalent_and_a_planted_bias_is_not(evaluated):
    errors = read(evaluated, "approximation")
    realigned = errors.query("what == 'realigned'").set_index(["mode", "lam"])
    assert realigned.loc["exact", "equivalent"].all()
    assert (realigned.loc["exact", "tost_p"] < 1e-6).all()
    biased = realigned.loc[("weights", 0.5)]
    assert not biased["equivalent"] and biased["tost_p"] > 0.5
    assert not errors.query("what == 'anchor as is'")["equivalent"].any()
    summary = realigned_within(evaluated)
    assert summary.loc["exact", "cells_equivalent"] == 2
    assert summary.loc["weights", "cells_equivalent"] == 0


def test_win_rates_of_a_model_that_is_its_target_are_half(evaluated):
    wins = read(evaluated, "wins").set_index(["mode", "lam"])
    assert (wins.loc["exact", "over_target"] == 50).all()
    assert (wins.loc["exact", "over_reference"] == 100).all()
    assert wins.loc[("exact", 0.5), "over_anchor"] == 0
    assert wins.loc[("exact", 2.0), "over_anchor"] == 100
    assert wins.loc[("weights", 0.5), "over_target"] == 100
    assert (wins["over_reference_low"] < 100).all()


def test_modes_are_compared_on_what_they_share(evaluated):
    modes = read(evaluated, "modes").query("what == 'realigned'").set_index("mode")
    assert list(modes.index) == ["exact", "weights"]
    assert set(modes["prompts"]) == {8} and set(modes["cells"]) == {1}
    summary = realigned_within(evaluated)
    assert summary.loc["exact", "cells"] == 2 and summary.loc["exact", "prompts"] == 12
    assert modes.loc["exact", "error"] == 0 < modes.loc["weights", "error"]


def test_settings_of_a_mode_are_modes_apart(tmp_path, counting_scorer):
    samples = [
        write_run(tmp_path / "a", 2000, lambdas=(0.0, 0.5, 1.0)),
        write_run(tmp_path / "a", 4000, lambdas=(0.0, 1.0)),
    ]
    anchor = str(tmp_path / "a" / "train" / "shapes-beta2000-seed0" / "anchor")
    for every, cost in ((2, 1.5), (4, 1.25)):
        settings = {"anchor": anchor, "every": every, "evaluations": cost}
        folder = tmp_path / f"every{every}"
        bias = 0.1 * every
        run = write_run(folder, 2000, lambdas=(0.5,), mode="reuse", bias=bias, **settings)
        samples.append(run)
    settings = {"anchor": anchor, "particles": 4, "every": None, "evaluations": 8.0}
    folder = tmp_path / "particles"
    samples.append(write_run(folder, 2000, lambdas=(0.5,), mode="particles", **settings))

    table = read(evaluate(tmp_path, samples), "modes")
    modes = table.query("what == 'realigned'").set_index("mode")
    assert list(modes.index) == ["exact", "particles 4", "reuse 2", "reuse 4"]
    assert modes["evaluations"].dropna().to_dict() == {
        "reuse 2": 1.5,
        "reuse 4": 1.25,
        "particles 4": 8.0,
    }
    assert 0 < modes.loc["reuse 2", "error"] < modes.loc["reuse 4", "error"]


def test_the_papers_measures_are_those_of_the_cells(evaluated):
    errors = read(evaluated, "approximation").query("what == 'realigned' and mode == 'weights'")
    agreement = read(evaluated, "agreement").set_index(["range", "mode"]).loc["0 < lam < 1"]
    weights = agreement.loc["weights"]
    assert weights["median"] == pytest.approx(errors["error"].median())
    assert weights["under"] == 0
    assert np.isnan(weights["bias"])  # of one cell there are no limits of agreement
    exact = agreement.loc["exact"]
    assert (exact["median"], exact["under"], exact["bias"], exact["upper"]) == (0, 100, 0, 0)

    # The paper's numbers are not beside ours: this is not its experiment
    paper = read(evaluated, "paper")
    row = paper.set_index(["range", "mode"]).loc[("0 < lam < 1", "weights")]
    percent = errors["percent_of_mean"].item()
    assert row["percent_of_mean"] == pytest.approx(percent)
    assert row["percent_with_identities"] == pytest.approx(percent / 2)
    assert paper["paper_error"].isna().all()
    assert "paper's" not in (evaluated / "tables" / "paper.md").read_text().split("\n\n")[1]


def test_the_papers_numbers_stand_beside_ours_where_the_experiment_is_the_papers(
    tmp_path, monkeypatch, counting_scorer
):
    samples = [write_run(tmp_path, 2000, **PAPER)]
    for beta in (1000, 4000, 8000):
        samples.append(write_run(tmp_path, beta, lambdas=(0.0, 1.0), **PAPER))
    rewrite_cards(tmp_path, "stabilityai/stable-diffusion-xl-base-1.0")
    run_dir = evaluate(tmp_path, samples, "pickscore")
    paper = read(run_dir, "paper").set_index("range")
    published = paper.loc["0 < lam < 1", ["paper_error", "paper_percent_of_mean"]]
    assert tuple(published) == MAE["sdxl"]["pickscore"]
    assert np.isnan(paper.loc["lam > 1", "paper_error"])
    rows = [row for row in markdown_rows(run_dir, "by_target") if "the paper's, beta 2000" in row]
    assert len(rows) == 1 and f"{BY_TARGET['pickscore'][1000]:.3g}" in rows[0]

    # The same images of another base model
    rewrite_cards(tmp_path, "somebody/else")
    assert read(evaluate(tmp_path, samples, "pickscore"), "paper")["paper_error"].isna().all()


def test_one_anchor_over_every_target_has_its_identity(evaluated):
    rows = markdown_rows(evaluated, "by_target")
    assert rows[0][-4:] == ["beta 1,000", "beta 2,000", "beta 4,000", "beta 8,000"]
    exact = next(row for row in rows if "exact" in row)
    assert exact[-4:] == ["0", "0", "0", "0"]
    assert set(read(evaluated, "by_target")["beta_target"]) == {1000, 4000, 8000}


def test_the_papers_anchor_is_counted_and_the_difference_explained(evaluated):
    cost = read(evaluated, "published").iloc[0]
    assert (cost["gpu_hours"], cost["published_flops"]) == (336, 188.7e18)
    assert cost["ratio"] == pytest.approx(cost["flops"] / 188.7e18)
    assert "is no count: it is 336 h at" in (evaluated / "tables" / "published.md").read_text()


def test_references_are_targets_and_nothing_else(tmp_path, counting_scorer, capsys):
    samples = [write_run(tmp_path, 2000)]
    references = [write_run(tmp_path, 4000), write_run(tmp_path, 8000, lambdas=(0.0, 1.0))]
    run_dir = evaluate(tmp_path, samples, references=references)
    errors = read(run_dir, "approximation").query("what == 'realigned'")
    # 4000 at lam 0.5 would have 8000 for a target, and its images between 0 and 1 are not scored
    assert set(errors["beta"]) == {2000}
    assert sorted(errors["beta_target"]) == [4000, 8000]
    assert len(pd.read_parquet(run_dir / "scores.parquet")) == 12 * (5 + 2 + 2)
    missing = "lam=2, mode exact, targets beta=1000: no sample run of an anchor at that beta"
    assert missing in capsys.readouterr().out
