"""The shipped shapes world: it loads in stock diffusers, it is small, and it is as good as its
figures say."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from benchmarks.shapes_assets import (
    SHIPPED,
    TOLERANCE,
    measure,
    ordered,
    renders,
    sampled,
    zero_shot,
)
from deradiff.models.base_model import BaseModel
from deradiff.scorers import load_scorer
from deradiff.worlds import shapes

FIGURES = json.loads((SHIPPED / "metrics.json").read_text())


def test_the_base_is_a_plain_pipeline_of_half_precision():
    pipe = DiffusionPipeline.from_pretrained(SHIPPED / "base")
    assert (
        type(pipe).__name__ == "StableDiffusionPipeline"
        and BaseModel("asset:shapes/base").family.name == "sd15"
    )
    files = list(SHIPPED.rglob("*"))
    assert sum(f.stat().st_size for f in files if f.is_file()) < 10e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pkl", ".py")]
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {
        torch.float32
    }
    assert pipe(shapes.CAPTIONS[0], num_inference_steps=2, height=32, width=32).images[0].size == (
        32,
        32,
    )
    stored = DiffusionPipeline.from_pretrained(
        SHIPPED / "base", dtype=torch.float16
    ).unet.state_dict()
    assert all(torch.equal(v, stored[k].float()) for k, v in pipe.unet.state_dict().items())


def test_pictures_of_held_out_captions_show_what_they_should():
    captions, clip = shapes.held_out_captions(), load_scorer("clip", "asset:shapes/clip")
    drawn = zero_shot(clip, sampled(SHIPPED / "base", captions), captions)
    real = zero_shot(clip, *renders(100, seed=3))
    assert drawn >= 0.8 * real > 0.7, (drawn, real)


@pytest.mark.parametrize("name, reward", [("pickscore", "vivid"), ("hpsv2", "crisp")])
def test_preference_scorers_order_pairs_as_their_reward(name, reward):
    share = ordered(load_scorer(name, f"asset:shapes/{name}"), getattr(shapes, reward), count=300)
    spread = 3 * np.sqrt(share * (1 - share) / 300)
    assert share == pytest.approx(FIGURES[f"{name}_orders_as_{reward}"], abs=spread)


@pytest.mark.slow
def test_every_shipped_figure_is_measured_again():
    """About two minutes; `make base` compares the same figures with models trained anew."""
    found = measure({name: SHIPPED / name for name in ("base", "clip", "pickscore", "hpsv2")})
    assert found.keys() == FIGURES.keys()
    for name, value in found.items():
        assert value == pytest.approx(
            FIGURES[name], abs=TOLERANCE * (10 if name.endswith("_db") else 1)
        ), name
    assert (
        found["judge_samples_all"] >= 0.9
        and found["clip_zero_shot_samples"] >= 0.8 * found["clip_zero_shot_renders"]
    )
