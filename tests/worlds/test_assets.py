"""The shipped shapes world: it loads in stock diffusers, is small, and keeps its figures."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from benchmarks.shapes_assets import (
    SHIPPED,
    measure,
    ordered,
    renders,
    sampled,
    tolerance_of,
    zero_shot,
)
from deradiff.models.base_model import BaseModel
from deradiff.scorers import load_scorer
from deradiff.worlds import shapes

FIGURES = json.loads((SHIPPED / "metrics.json").read_text())


def test_the_base_is_a_plain_pipeline():
    pipe = DiffusionPipeline.from_pretrained(SHIPPED / "base")
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert BaseModel("asset:shapes/base").family.name == "sd15"
    image = pipe(shapes.CAPTIONS[0], num_inference_steps=2, height=32, width=32).images[0]
    assert image.size == (32, 32)


def test_a_plain_load_gives_single_precision_of_weights_stored_in_half():
    pipe = DiffusionPipeline.from_pretrained(SHIPPED / "base")
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}

    half = DiffusionPipeline.from_pretrained(SHIPPED / "base", dtype=torch.float16)
    stored = half.unet.state_dict()
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, stored[name].float())


def test_the_files_are_small_and_hold_no_code():
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl", ".py")]


def test_images_of_held_out_captions_show_what_they_should():
    captions = shapes.held_out_captions()
    clip = load_scorer("clip", "asset:shapes/clip")
    on_samples = zero_shot(clip, sampled(SHIPPED / "base", captions), captions)
    on_renders = zero_shot(clip, *renders(100, seed=3))
    assert 0.8 * on_renders > 0.7
    assert on_samples >= 0.8 * on_renders


@pytest.mark.parametrize(("name", "reward"), [("pickscore", "vivid"), ("hpsv2", "crisp")])
def test_preference_scorers_order_pairs_as_their_reward(name, reward):
    pairs = 300
    scorer = load_scorer(name, f"asset:shapes/{name}")
    share = ordered(scorer, getattr(shapes, reward), count=pairs)
    standard_error = np.sqrt(share * (1 - share) / pairs)
    expected = FIGURES[f"{name}_orders_as_{reward}"]
    assert share == pytest.approx(expected, abs=3 * standard_error)


@pytest.mark.slow
def test_every_shipped_figure_is_measured_again():
    """About two minutes; `make base` compares the same figures with models trained anew."""
    folders = {name: SHIPPED / name for name in ("base", "clip", "pickscore", "hpsv2")}
    figures = measure(folders)
    assert figures.keys() == FIGURES.keys()
    for name, figure in figures.items():
        assert figure == pytest.approx(FIGURES[name], abs=tolerance_of(name)), name

    assert figures["judge_samples_all"] >= 0.9
    assert figures["clip_zero_shot_samples"] >= 0.8 * figures["clip_zero_shot_renders"]
