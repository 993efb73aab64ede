"""Choosing lambda: the planted best is found, on prompts that do not report it, under its budget,
with an alarm where it is planted."""

import hashlib

import numpy as np
import pandas as pd
import pytest

from deradiff.evaluation import Comparison, Options
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import SampledModel
from deradiff.evaluation.tables import selection
from eval.config import SelectConfig
from tests.support.sampled_runs import LAMBDAS, counting, evaluate, read, write_run

SAMPLED = dict(zip(SAMPLING_COLUMNS, ("ddim", 0.0, 20, 7.5, 64, 64)))


def study(effects, prompts=60, noise=0.05, beta=1000.0, text="prompt {}", **columns):
    """Samples and groups in which scorer s at lam has mean effects[s](lam), with noise between
    prompts that all lambdas share."""
    rng, lambdas = np.random.default_rng(0), (0.0, 0.5, 1.0, 2.0)
    rows = [
        {
            **SAMPLED,
            "anchor": "a",
            "mode": "exact",
            "lam": lam,
            "prompt_id": f"p{p:03}",
            "seed": 0,
            "prompt": text.format(p),
            "beta": beta,
        }
        | {"realigned": True, "path_kl": 10 * lam**2}
        | columns
        for lam in lambdas
        for p in range(prompts)
    ]
    samples = pd.DataFrame(rows)
    common = {scorer: rng.normal(size=prompts) for scorer in effects}
    groups = {}
    for lam in lambdas:
        group = SampledModel(*SAMPLED.values(), "a", "exact", lam)
        index = pd.MultiIndex.from_product(
            [[f"p{p:03}" for p in range(prompts)], [0]], names=["prompt_id", "seed"]
        )
        scores = {
            s: effect(lam) + common[s] + noise * rng.normal(size=prompts)
            for s, effect in effects.items()
        }
        groups[group] = pd.DataFrame(scores, index=index)
    return samples, groups


def select(samples, groups, scorers, config):
    """The answer for scores that are given by model."""
    options = Options(score=config.score, path_kl=config.path_kl)
    nothing = pd.DataFrame()
    return selection.select(
        Comparison(samples, nothing, [], [], {}, scorers, options, model_scores=groups)
    )


RISES = {"good": lambda lam: -((lam - 1) ** 2), "other": lambda lam: 0.1 * lam}
HACKED = {
    "good": lambda lam: lam,
    "other": lambda lam: -((lam - 0.5) ** 2),
    "flat": lambda lam: 0.0,
}


def chosen(answer):
    return answer.table.data.query("chosen").iloc[0]


def test_the_best_lambda_is_chosen_with_what_it_is_worth():
    samples, groups = study(RISES)
    answer = select(samples, groups, [*RISES], SelectConfig("good"))
    row = chosen(answer)
    assert row["lam"] == 1 and row["gain_low"] < 1 < row["gain_high"]
    assert answer.sentence.startswith(
        "Choose lam = 1 (beta_target 1,000) of a: on prompts that had no say in it, good is "
    )
    assert answer.alarm == () and "no other score falls" in answer.sentence
    assert (answer.table.data.query("lam != 1")["below_chosen_low"] > 0).all()


def test_the_budget_binds_by_path_kl():
    samples, groups = study(RISES)
    within = chosen(select(samples, groups, [*RISES], SelectConfig("good", path_kl=5.0)))
    assert (within["lam"], within["path_kl"]) == (0.5, 2.5)
    none = chosen(select(samples, groups, [*RISES], SelectConfig("good", path_kl=0.0)))
    assert none["lam"] == 0
    unknown = select(
        samples[samples["lam"] > 0].assign(path_kl=np.nan),
        groups,
        [*RISES],
        SelectConfig("good", path_kl=5.0),
    )
    assert unknown.sentence.startswith("No lambda is chosen: ") and unknown.table.data.empty


def test_what_is_reported_is_of_prompts_that_did_not_choose():
    """Where every difference is noise, the winner of a choice looks good on the prompts that chose
    it, and not on the others."""
    gains = {"choosing": [], "reporting": []}
    for seed in range(40):
        samples, groups = study({"s": lambda lam: 0.0}, prompts=24)
        rng = np.random.default_rng(seed)
        groups = {g: rows + rng.normal(size=rows.shape) for g, rows in groups.items()}
        data = select(samples, groups, ["s"], SelectConfig("s")).table.data
        best = data.query("chosen").iloc[0]
        gains["choosing"].append(best["choosing_mean"] - data["choosing_mean"].mean())
        gains["reporting"].append(best["mean"] - data["mean"].mean())
    assert np.mean(gains["choosing"]) > 0.15 and abs(np.mean(gains["reporting"])) < 0.1


def test_one_text_is_never_on_both_sides():
    samples, groups = study(RISES, prompts=40, text="{}")
    twins = samples["prompt_id"].str[1:].astype(int) % 5  # eight ids a text
    answer = select(
        samples.assign(prompt="text " + twins.astype(str)), groups, [*RISES], SelectConfig("good")
    )
    choosing = [
        t
        for t in range(5)
        if int.from_bytes(hashlib.sha256(f"text {t}".encode()).digest()[:8]) / 2**64 < 0.5
    ]
    assert (
        f"{8 * len(choosing)} and {8 * (5 - len(choosing))} prompts" in answer.table.note
        and 0 < len(choosing) < 5
    )


def test_reward_hacking_raises_the_alarm_and_names_what_is_calm():
    samples, groups = study(HACKED)
    answer = select(samples, groups, [*HACKED], SelectConfig("good"))
    assert chosen(answer)["lam"] == 2 and answer.alarm == ("other",)
    assert (
        "Reward-hacking alarm: other falls as good rises; the best without it is lam = 0.5 "
        in answer.sentence
    )
    calm = select(samples, groups, [*HACKED], SelectConfig("good", path_kl=4.0))
    assert chosen(calm)["lam"] == 0.5 and calm.alarm == ()


def test_too_few_prompts_choose_nothing():
    samples, groups = study(RISES, prompts=2)
    assert (
        "too few to choose by some"
        in select(samples, groups, [*RISES], SelectConfig("good")).sentence
    )


@pytest.fixture
def colourful(monkeypatch):
    return counting(monkeypatch)


def test_the_stage_chooses_among_samples_and_not_references(tmp_path, colourful, capsys):
    samples = [write_run(tmp_path, 2000, prompts=12)]
    references = [
        write_run(tmp_path, 400, lambdas=(0.0, 1.0), prompts=12)
    ]  # more vivid than all of the samples
    run_dir = evaluate(tmp_path, samples, references=references)
    found = read(run_dir, "selection")
    assert sorted(found["lam"]) == sorted(LAMBDAS) and found.query("chosen")["lam"].item() == 2
    assert (
        "eval: Choose lam = 2 (beta_target 1,000) of shapes-beta2000-seed0"
        in capsys.readouterr().out
    )
    evaluate(
        tmp_path, samples, references=references, select=SelectConfig(path_kl=20.0)
    )  # the same folder: no score depends on it
    assert read(run_dir, "selection").query("chosen")["lam"].item() == 1
