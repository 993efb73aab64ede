"""`deradiff.sweep`: lambda in a notebook, in one call."""

import numpy as np
import pytest
import torch

import deradiff
from tests.support.tiny_pipelines import perturbed_denoiser, tiny_pipeline

PROMPTS = ['a fox <script>alert("x")</script>', "a boat"]
CALL = {"num_inference_steps": 2, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline("sd15")
    pipe.set_progress_bar_config(disable=True, desc="mine")
    return pipe


@pytest.fixture(scope="module")
def anchor(pipe):
    """An aligned network in memory."""
    return perturbed_denoiser(pipe.unet)


@pytest.fixture(scope="module")
def swept(pipe, anchor):
    return deradiff.sweep(
        pipe, anchor, [0, 0.5, 1], PROMPTS, seeds=[0, 3], scorers=["colourful"], **CALL
    )


def test_an_image_is_that_of_the_realigned_pipeline(pipe, anchor, swept):
    rows = swept.table.set_index(["prompt", "seed", "lam"])
    assert len(rows) == 2 * 2 * 3 and swept.lams == [0, 0.5, 1]
    with deradiff.realign(pipe, anchor, lam=0.5) as dial:
        generator = torch.Generator().manual_seed(3)
        image = pipe("a boat", generator=generator, **CALL).images[0]
        path_kl = dial.path_kl.item()
    row = rows.loc["a boat", 3, 0.5]
    difference = np.asarray(row["image"], dtype=float) - np.asarray(image, dtype=float)
    assert abs(difference).max() <= 1, "a grey level, for the rounding of a batch"
    assert row["path_kl"] == pytest.approx(path_kl, rel=1e-3) and row["evaluations"] == 2
    assert (rows.xs(0.0, level="lam")["path_kl"] == 0).all()
    assert (rows.xs(1.0, level="lam")["path_kl"] > 0).all()


def test_the_pipeline_is_as_it_was(pipe, swept):
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}
    with deradiff.realign(pipe, perturbed_denoiser(pipe.unet), 0.5):
        pass


def test_scores_are_the_scorers(swept):
    images = list(swept.table["image"])
    scores = deradiff.load_scorer("colourful")(images, [""] * len(images))
    assert np.allclose(swept.table["colourful"], scores)


def test_the_grid_has_a_row_a_prompt_and_seed_and_a_column_a_lambda(swept):
    small, large = swept.grid(tile=32), swept.grid(tile=64)
    assert large.width - small.width == 3 * 32
    assert large.height - small.height == 4 * 32


def test_the_slider_shows_all_images_of_one_lambda_and_prompts_as_text(swept):
    slider, pictures = swept.slider().children
    assert slider.value == 1 and pictures.value == swept.page(1.0)
    slider.value = 0.5
    assert pictures.value == swept.page(0.5) != swept.page(1.0)
    assert pictures.value.count("<img") == 4 and "<script" not in pictures.value
    assert "&lt;script&gt;" in pictures.value and "colourful" in pictures.value


def test_mistakes_are_told_before_an_image_is_sampled(pipe, anchor, monkeypatch):
    monkeypatch.setattr(type(pipe), "__call__", None)
    with pytest.raises(ValueError, match="prompts is empty: give at least one"):
        deradiff.sweep(pipe, anchor)
    with pytest.raises(ValueError, match="lams is empty"):
        deradiff.sweep(pipe, anchor, [], "a fox")
    with pytest.raises(ValueError, match="vivid judges by captions of the shapes world"):
        deradiff.sweep(pipe, anchor, [0], "a fox", scorers=["vivid"])
    with pytest.raises(ValueError, match="no scorer 'vivvid'"):
        deradiff.sweep(pipe, anchor, [0], "a fox", scorers=["vivvid"])
    with pytest.raises(ValueError, match="mode must be"):
        deradiff.sweep(pipe, anchor, [0], "a fox", mode="fast")
