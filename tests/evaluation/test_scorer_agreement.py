"""The table of how far scorers agree: from scores that are planted."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from deradiff.evaluation import Comparison, scorer_agreement
from deradiff.evaluation.tables.scorer_agreement import mean_over_prompts

LAMBDAS = (0.0, 0.5, 1.0)
SAMPLED = {
    "sampler": "ddim",
    "eta": 0.0,
    "steps": 20,
    "guidance_scale": 2.5,
    "height": 32,
    "width": 32,
    "mode": "exact",
}


def scored(scores_of, prompts=40, seeds=2, anchors=("a", "b")):
    """A comparison of scored images.

    At lam = 0 the anchors have one image, as the reference is one.

    Args:
        scores_of: (prompt, seed, anchor, lam) -> the score of each scorer by its label.
        prompts: how many.
        seeds: of each prompt.
        anchors: their names.
    """
    rows = []
    for prompt in range(prompts):
        for seed in range(seeds):
            for anchor in anchors:
                for lam in LAMBDAS:
                    name = f"{anchor}-{lam}" if lam else "reference"
                    row = SAMPLED | {"prompt_id": f"p{prompt}", "seed": seed, "lam": lam}
                    row |= {"anchor": anchor, "sha256": f"{name}-{prompt}-{seed}"}
                    for scorer, score in scores_of(prompt, seed, anchor, lam).items():
                        rows.append(row | {"scorer": scorer, "score": score})
    scores = pd.DataFrame(rows)
    return Comparison(
        samples=scores,
        scores=scores,
        cells=[],
        missing=[],
        cards={},
        scorers=list(dict.fromkeys(scores["scorer"])),
    )


def rows_of(comparison):
    """The table's rows by the two scorers."""
    return scorer_agreement(comparison).data.set_index(["scorer", "other"])


def test_what_agrees_what_differs_and_what_is_noise():
    rng = np.random.default_rng(0)
    noise = {}

    def scores_of(prompt, seed, anchor, lam):
        # The reference's image has one score
        key = (prompt, seed, anchor if lam else "", lam)
        value = lam + (0.1 if anchor == "a" and lam else 0)
        noise.setdefault(key, rng.normal())
        return {"good": value, "twice": 2 * value + prompt, "bad": -value, "noise": noise[key]}

    rows = rows_of(scored(scores_of))
    assert list(rows.index) == [
        ("good", "twice"),
        ("good", "bad"),
        ("good", "noise"),
        ("twice", "bad"),
        ("twice", "noise"),
        ("bad", "noise"),
    ]
    # Five images from each noise: the reference counts once, though both anchors have it
    assert set(rows["pairs"]) == {40 * 2 * 10} and set(rows["prompts"]) == {40}
    assert rows.loc[("good", "twice"), "same"] == 100
    assert rows.loc[("good", "twice"), "tau"] == pytest.approx(1)
    assert rows.loc[("good", "bad"), ["same", "tau"]].tolist() == pytest.approx([0, -1])
    by_chance = rows.loc[("good", "noise")]
    assert by_chance["same_low"] < 50 < by_chance["same_high"]
    assert by_chance["tau_low"] < 0 < by_chance["tau_high"]
    assert by_chance["same_high"] - by_chance["same_low"] < 15


def test_prompts_and_not_images_are_the_draws():
    """On one prompt out of two all agree, on the others none: the interval is that of coins."""

    def scores_of(prompt, seed, anchor, lam):
        return {"x": lam, "y": lam if prompt % 2 else -lam}

    row = rows_of(scored(scores_of, prompts=40, anchors=("a",))).loc[("x", "y")]
    assert row["same"] == 50 and row["tau"] == pytest.approx(0)
    half_width = (row["same_high"] - row["same_low"]) / 2
    assert half_width == pytest.approx(100 * 1.96 * 0.5 / np.sqrt(40), rel=0.2)


def test_images_of_other_noise_make_no_pair_but_a_ranking():
    def scores_of(prompt, seed, anchor, lam):
        return {"x": seed, "y": seed}

    comparison = scored(scores_of, seeds=3, anchors=("a",))
    only_one = comparison.scores[comparison.scores["lam"] == 1]
    table = scorer_agreement(Comparison(only_one, only_one, [], [], {}, comparison.scorers))
    row = table.data.iloc[0]
    assert row["pairs"] == 0 and np.isnan(row["same"]) and row["tau"] == pytest.approx(1)
    assert table.display["same preference, %"].tolist() == ["–"]


def test_images_that_were_sampled_otherwise_are_not_compared():
    comparison = scored(lambda p, s, a, lam: {"x": lam, "y": lam}, anchors=("a",))
    scores = comparison.scores.assign(steps=np.where(comparison.scores["lam"] == 1, 50, 20))
    row = scorer_agreement(Comparison(scores, scores, [], [], {}, ["x", "y"])).data.iloc[0]
    assert row["pairs"] == 40 * 2  # lam 0 and 0.5, and not 1


def test_one_scorer_or_one_image_has_no_table():
    assert scorer_agreement(scored(lambda p, s, a, lam: {"x": lam})).is_empty
    comparison = scored(lambda p, s, a, lam: {"x": lam, "y": lam}, seeds=1)
    alone = comparison.scores[comparison.scores["lam"] == 0]
    assert scorer_agreement(Comparison(alone, alone, [], [], {}, ["x", "y"])).is_empty


def test_the_mean_is_over_prompts():
    estimate = mean_over_prompts([0.0, 0.0, 0.0, 1.0, np.nan], ["a", "a", "a", "b", "b"])
    assert estimate.value == 0.5
