"""The scorers that are formulas."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from deradiff.scorers import SCORERS, load_scorer
from deradiff.scorers.weighted_sum import WeightedSum
from deradiff.worlds import shapes
from tests.support.scorer_images import assert_close


@pytest.mark.parametrize("name", ["vivid", "crisp"])
def test_the_true_rewards_are_scorers(name: str) -> None:
    scenes = shapes.SCENES[::37]
    rendered = shapes.render(scenes, np.random.default_rng(0))
    images = [Image.fromarray(pixels) for pixels in rendered]
    prompts = [str(scene) for scene in scenes]
    scorer = load_scorer(name)

    with_alpha = [image.convert("RGBA") for image in images]
    reward = getattr(shapes, name)
    assert_close(scorer(with_alpha, tuple(prompts)), reward(images, prompts))

    assert (scorer.name, scorer.scale) == (name, "reward")
    assert len(scorer.version) == 12
    assert name in SCORERS
    assert scorer([], []).shape == (0,)
    with pytest.raises(ValueError, match="1 images and 0 prompts"):
        scorer(images[:1], [])


def test_colourful_is_hasler_and_suesstrunks_measure() -> None:
    grey = Image.new("RGB", (3, 3), (90, 90, 90))
    halves = Image.new("RGB", (4, 2), (255, 0, 0))
    halves.paste((0, 0, 255), (2, 0, 4, 2))

    # Red-green is 255 and 0, yellow-blue 127.5 and -255: standard deviations 127.5 and 191.25,
    # means 127.5 and -63.75.
    expected = np.hypot(127.5, 191.25) + 0.3 * np.hypot(127.5, 63.75)
    of_grey, of_halves = load_scorer("colourful")([grey, halves], ["", ""]).tolist()
    assert of_grey == 0
    assert of_halves == pytest.approx(expected)


def test_a_weighted_sum_adds_scores_in_their_own_units() -> None:
    scenes = shapes.SCENES[::37]
    rendered = shapes.render(scenes, np.random.default_rng(0))
    images = [Image.fromarray(pixels) for pixels in rendered]
    prompts = [str(scene) for scene in scenes]
    weighted = WeightedSum({"crisp": 0.25, "colourful": 2.0})

    crisp = load_scorer("crisp")(images, prompts)
    colourful = load_scorer("colourful")(images, prompts)
    assert_close(weighted(images, prompts), 0.25 * crisp + 2 * colourful)

    assert weighted.name == "0.25 crisp + 2.0 colourful"
    assert len(weighted.version) == 12
    assert weighted.version != WeightedSum({"crisp": 0.25, "colourful": 1.0}).version
    assert weighted([], []).shape == (0,)
    with pytest.raises(ValueError, match="no scorer 'vivvid'"):
        WeightedSum({"vivvid": 1.0})
