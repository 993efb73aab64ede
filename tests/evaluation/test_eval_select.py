"""Choosing lambda: the planted best is found, on prompts that do not report it, under its budget,
with an alarm where it is planted."""

import hashlib
import re

import numpy as np
import pandas as pd
import pytest

from deradiff.evaluation import Comparison, Options
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import SampledModel
from deradiff.evaluation.selection import choosing_mask
from deradiff.evaluation.tables import selection
from eval.config import SelectConfig
from eval.stage import run
from tests.support.sampled_runs import LAMBDAS, configured, evaluate, read, write_run

SAMPLING = dict(zip(SAMPLING_COLUMNS, ("ddim", 0.0, 20, 7.5, 64, 64)))
STUDY_LAMBDAS = (0.0, 0.5, 1.0, 2.0)


def study(effects, prompts=60, noise=0.05, beta=1000.0, text="prompt {}"):
    """Samples of one anchor, and each model's scores, with planted effects of lambda.

    Scorer s has mean effects[s](lam) at lam. Prompts differ by far more, alike at all lambdas, and
    by some noise.
    """
    ids = [f"p{prompt:03}" for prompt in range(prompts)]
    rows = []
    for lam in STUDY_LAMBDAS:
        for prompt, prompt_id in enumerate(ids):
            row = {
                **SAMPLING,
                "anchor": "a",
                "mode": "exact",
                "lam": lam,
                "prompt_id": prompt_id,
                "seed": 0,
                "prompt": text.format(prompt),
                "beta": beta,
                "beta_target": beta / lam if lam else None,
                "realigned": True,
                "path_kl": 10 * lam**2,
            }
            rows.append(row)

    rng = np.random.default_rng(0)
    common = {scorer: rng.normal(size=prompts) for scorer in effects}
    index = pd.MultiIndex.from_product([ids, [0]], names=["prompt_id", "seed"])
    model_scores = {}
    for lam in STUDY_LAMBDAS:
        scores = {}
        for scorer, effect in effects.items():
            scores[scorer] = effect(lam) + common[scorer] + noise * rng.normal(size=prompts)
        model = SampledModel(*SAMPLING.values(), "a", "exact", lam)
        model_scores[model] = pd.DataFrame(scores, index=index)
    return pd.DataFrame(rows), model_scores


def select(samples, model_scores, scorers, config):
    """The answer for scores that are given by model."""
    comparison = Comparison(
        samples,
        scores=pd.DataFrame(),
        cells=[],
        missing=[],
        cards={},
        scorers=scorers,
        options=Options(score=config.score, path_kl=config.path_kl),
        model_scores=model_scores,
    )
    return selection.select(comparison)


RISES = {"good": lambda lam: -((lam - 1) ** 2), "other": lambda lam: 0.1 * lam}
HACKED = {
    "good": lambda lam: lam,
    "other": lambda lam: -((lam - 0.5) ** 2),
    "flat": lambda lam: 0.0,
}


def chosen(answer):
    return answer.table.data.query("chosen").iloc[0]


def test_the_best_lambda_is_chosen_with_what_it_is_worth():
    samples, model_scores = study(RISES)
    answer = select(samples, model_scores, [*RISES], SelectConfig("good"))
    row = chosen(answer)
    assert row["lam"] == 1 and row["gain_low"] < 1 < row["gain_high"]
    assert answer.sentence.startswith(
        "Choose lam = 1 (beta_target 1,000) of a: on held-out prompts, good is "
    )
    assert answer.alarm == () and "No other score falls as good rises." in answer.sentence
    assert (answer.table.data.query("lam != 1")["below_chosen_low"] > 0).all()


def test_the_budget_binds_by_path_kl():
    samples, model_scores = study(RISES)
    within = chosen(select(samples, model_scores, [*RISES], SelectConfig("good", path_kl=5.0)))
    assert (within["lam"], within["path_kl"]) == (0.5, 2.5)
    none = chosen(select(samples, model_scores, [*RISES], SelectConfig("good", path_kl=0.0)))
    assert none["lam"] == 0
    unmeasured = samples[samples["lam"] > 0].assign(path_kl=np.nan)
    unknown = select(unmeasured, model_scores, [*RISES], SelectConfig("good", path_kl=5.0))
    assert unknown.sentence.startswith("No lambda is chosen: ") and unknown.table.data.empty


def test_what_is_reported_is_of_prompts_that_did_not_choose():
    """Where every difference is noise, the winner of a choice looks good on the prompts that chose
    it, and not on the others."""
    gains = {"choosing": [], "reporting": []}
    for seed in range(40):
        samples, model_scores = study({"s": lambda lam: 0.0}, prompts=24)
        rng = np.random.default_rng(seed)
        model_scores = {
            model: scores + rng.normal(size=scores.shape) for model, scores in model_scores.items()
        }
        data = select(samples, model_scores, ["s"], SelectConfig("s")).table.data
        best = data.iloc[0]
        gains["choosing"].append(best["choosing_mean"] - data["choosing_mean"].mean())
        gains["reporting"].append(best["mean"] - data["mean"].mean())
    assert np.mean(gains["choosing"]) > 0.15 and abs(np.mean(gains["reporting"])) < 0.1


def test_one_text_is_never_on_both_sides():
    samples, model_scores = study(RISES, prompts=40, text="{}")
    twins = samples["prompt_id"].str[1:].astype(int) % 5  # eight ids a text
    samples = samples.assign(prompt="text " + twins.astype(str))
    answer = select(samples, model_scores, [*RISES], SelectConfig("good"))

    # By the first 64 bits of each text's hash
    choosing = 0
    for text in range(5):
        digest = hashlib.sha256(f"text {text}".encode()).digest()
        if int.from_bytes(digest[:8]) / 2**64 < 0.5:
            choosing += 1
    assert 0 < choosing < 5
    assert f"{8 * choosing} and {8 * (5 - choosing)} prompts" in answer.table.note


def test_what_the_alarm_warns_of_is_not_recommended():
    samples, model_scores = study(HACKED)
    answer = select(samples, model_scores, [*HACKED], SelectConfig("good"))
    assert chosen(answer)["lam"] == 0.5 and answer.alarm == ("other",)
    assert answer.sentence.startswith("Choose lam = 0.5 (beta_target 2,000) of a: on held-out ")
    passed = r"Passed over by the reward-hacking alarm: lam = 2 .* where other falls as good rises"
    assert re.search(passed, answer.sentence)
    calm = select(samples, model_scores, [*HACKED], SelectConfig("good", path_kl=4.0))
    assert chosen(calm)["lam"] == 0.5 and calm.alarm == ()


def test_of_those_that_cannot_be_told_apart_the_one_nearest_to_the_reference_is_chosen():
    plateau = {"good": lambda lam: min(lam, 0.5), "other": lambda lam: 0.0}
    samples, model_scores = study(plateau)
    answer = select(samples, model_scores, [*plateau], SelectConfig("good"))
    assert chosen(answer)["lam"] == 0.5
    assert sorted(answer.table.data.query("alike")["lam"]) == [0.5, 1.0, 2.0]
    assert "good does not tell it apart from lam = " in answer.sentence
    assert answer.sentence.count("of these it has the smallest path KL") == 1

    # The path KL of mode weights is not measured
    samples.loc[samples["lam"] == 1, "path_kl"] = np.nan
    unmeasured = select(samples, model_scores, [*plateau], SelectConfig("good"))
    assert chosen(unmeasured)["lam"] == 0.5


def test_the_answer_says_how_many_prompts_would_tell_more():
    plateau = {"good": lambda lam: min(lam, 0.5), "other": lambda lam: 0.0}
    samples, model_scores = study(plateau)
    answer = select(samples, model_scores, [*plateau], SelectConfig("good"))
    assert chosen(answer)["lam"] == 0.5

    # By hand, from the held-out prompts' scores
    data = answer.table.data.set_index("lam")
    rival = data.query("alike and not chosen").iloc[0]
    difference = rival["below_chosen"]
    choosing = choosing_mask(list(samples["prompt"].unique()))
    scores = {model.lam: frame["good"].to_numpy() for model, frame in model_scores.items()}
    held_out = (scores[0.5] - scores[rival.name])[~choosing]
    assert difference == pytest.approx(held_out.mean())
    needed = 2 * (2.8016 * held_out.std(ddof=1) / difference) ** 2
    assert rival["prompts_to_tell"] == pytest.approx(needed, abs=1)
    assert rival["fewest_to_tell"] < rival["prompts_to_tell"]
    rounded = f"{float(f'{needed:.2g}'):,.0f}"
    assert f"About {rounded} prompts would tell it from lam = {rival.name:g} " in answer.sentence
    assert answer.sentence.count("here are 60.") == 1


def test_where_nothing_is_as_good_no_more_prompts_are_asked_for():
    samples, model_scores = study(RISES)
    answer = select(samples, model_scores, [*RISES], SelectConfig("good"))
    assert "prompts would tell" not in answer.sentence


def test_equal_images_are_told_apart_by_no_number_of_prompts():
    samples, model_scores = study({"good": lambda lam: 0.0}, noise=0.0)
    answer = select(samples, model_scores, ["good"], SelectConfig("good"))
    assert "From lam = 0.5 (beta_target 2,000) of a no number of prompts would tell it." in (
        answer.sentence
    )


def test_too_few_prompts_choose_nothing():
    samples, model_scores = study(RISES, prompts=2)
    answer = select(samples, model_scores, [*RISES], SelectConfig("good"))
    assert "too few to choose by some" in answer.sentence


def test_the_stage_chooses_among_samples_and_not_references(tmp_path, counting_scorer, capsys):
    samples = [write_run(tmp_path, 2000, prompts=12)]
    # More vivid than all of the samples
    references = [write_run(tmp_path, 400, lambdas=(0.0, 1.0), prompts=12)]
    run_dir = evaluate(tmp_path, samples, references=references)
    found = read(run_dir, "selection")
    assert sorted(found["lam"]) == sorted(LAMBDAS) and found.query("chosen")["lam"].item() == 2
    answer = "eval: Choose lam = 2 (beta_target 1,000) of shapes-beta2000-seed0"
    assert answer in capsys.readouterr().out

    # The same folder: no score depends on the budget
    within = SelectConfig(path_kl=20.0)
    evaluate(tmp_path, samples, references=references, select=within)
    assert read(run_dir, "selection").query("chosen")["lam"].item() == 1


def test_a_planted_hacked_anchor_is_not_recommended_and_a_planted_honest_one_is(tmp_path, capsys):
    """The hacked one is the more vivid, but its edges blur, by which crisp falls."""
    honest = write_run(tmp_path, 4000, name="honest", prompts=16)
    hacked = write_run(tmp_path, 500, name="hacked", prompts=16, softness=2)
    table = read(evaluate(tmp_path, [honest, hacked], "vivid", "crisp"), "selection")

    best = table.iloc[0]
    assert "hacked" in best["anchor"] and best["alarm"] == "crisp" and not best["chosen"]
    assert best["below_chosen_high"] < 0, "it is the more vivid"
    assert "honest" in table.query("chosen")["anchor"].item()
    assert table[table["anchor"].str.contains("honest")]["alarm"].isna().all()
    said = capsys.readouterr().out
    assert "eval: Choose lam = 2 (beta_target 2,000) of honest: " in said
    passed_over = (
        r"Passed over by the reward-hacking alarm: .* of hacked, vivid .* where crisp falls"
    )
    assert re.search(passed_over, said)

    # As vivid, with its edges as they were: it is recommended
    honest_too = write_run(tmp_path, 500, name="strong", prompts=16)
    table = read(evaluate(tmp_path, [honest, honest_too], "vivid", "crisp"), "selection")
    assert "strong" in table.query("chosen")["anchor"].item() and table["alarm"].isna().all()


def test_stand_ins_are_labelled_and_nothing_that_nobody_asked_for_is_missing(
    tmp_path, counting_scorer, capsys
):
    samples = [write_run(tmp_path, 2000, prompts=12)]
    config, run_dir = configured(tmp_path, samples, "pickscore", "vivid")
    config.scorers["pickscore"].checkpoint = "asset:shapes/pickscore"
    run(config, run_dir)
    assert set(read(run_dir, "means")["scorer"]) == {"pickscore (shapes)", "vivid"}
    assert "pickscore (shapes)" in (run_dir / "report.html").read_text()
    assert "pickscore (shapes)" in (run_dir / "plots/score_against_lambda.svg").read_text()
    said = capsys.readouterr().out
    assert "pickscore (shapes) is " in said
    assert "missing" not in said
