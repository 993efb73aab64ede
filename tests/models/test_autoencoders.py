"""Autoencoders that overflow in float16 encode and decode in float32, and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deradiff import realign
from deradiff.anchors.anchor import AnchorCard, load_anchor, save_anchor
from deradiff.data.cache import Cache, NotFiniteError, encode_images
from deradiff.data.pairs import Pairs
from deradiff.models.autoencoders import encoding_precision, overflows
from deradiff.models.base_model import BaseModel
from deradiff.training.panel import encode_prompts, sample_panel
from tests.support.tables import write_four_pairs
from tests.support.tiny_pipelines import save_overflowing, tiny_lora, tiny_pipeline
from tests.support.train_runs import small_run
from train.build import run_encoders_key

IMAGES = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """An SDXL whose autoencoder overflows in float16, and whose config says so."""
    return BaseModel(str(save_overflowing("sdxl", tmp_path_factory.mktemp("overflowing"))))


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """The same, whose config says that it does not overflow."""
    folder = tmp_path_factory.mktemp("silent")
    return BaseModel(str(save_overflowing("sdxl", folder, force_upcast=False)))


def test_an_autoencoder_that_overflows_encodes_in_float32(overflowing):
    pipe = overflowing.load_pipeline(torch.float16)
    naive = pipe.vae.encode(IMAGES.half()).latent_dist.mode()
    assert not naive.isfinite().all()

    before = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    latents = encode_images(pipe, IMAGES)
    exact = encode_images(overflowing.load_pipeline(torch.float32), IMAGES)
    assert latents.dtype == torch.float16
    assert torch.equal(latents, exact.half())

    # Afterwards it is as it was
    after = pipe.vae.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert pipe.vae.dtype == torch.float16


def test_autocast_does_not_reach_it(overflowing):
    pipe = overflowing.load_pipeline(torch.float16)
    expected = encode_images(pipe, IMAGES)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(encode_images(pipe, IMAGES), expected)


def test_the_stock_pipeline_decodes_it_in_float32_with_and_without_the_dial(overflowing, tmp_path):
    pipe = overflowing.load_pipeline(torch.float16)
    card = AnchorCard(base_model=overflowing.source, family="sdxl", method="lora", beta=None)
    save_anchor(tmp_path, tiny_lora(tiny_pipeline("sdxl").unet), card)
    call = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "pt"}
    naive = pipe.vae.decode(torch.randn(1, 4, 8, 8).half()).sample
    assert not naive.isfinite().all()
    plain = pipe("a fox", **call).images
    with realign(pipe, tmp_path, lam=0.5):
        dialled = pipe("a fox", **call).images
    for images in (plain, dialled):
        assert images.isfinite().all()
        assert images.std() > 0
    assert pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_are_left_alone(overflowing, dtype):
    vae = overflowing.load_vae(dtype)
    assert not overflows(vae)
    with encoding_precision(vae):
        assert vae.dtype == dtype


def test_a_config_that_says_nothing_or_no_is_left_alone(silent):
    """diffusers fills in `true` for SD1.5's, which says nothing."""
    vae = silent.load_vae(torch.float16)
    assert not overflows(vae)
    vae = tiny_pipeline("sd15").vae.to(torch.float16)
    assert vae.config.force_upcast
    assert not overflows(vae)


def test_latents_that_are_not_finite_are_refused_and_not_written(silent, tmp_path):
    pairs = Pairs(str(write_four_pairs(tmp_path / "pairs.parquet")))
    cache = Cache(tmp_path / "cache", "sdxl", pairs, resolution=64)
    message = r"the autoencoder .*vae gives latents in float16 .* not cached: compute in bfloat16"
    with pytest.raises(NotFiniteError, match=message):
        cache.build(lambda: silent.load_pipeline(torch.float16))
    assert not list(cache.folder.glob("*.safetensors"))


def test_a_cache_of_an_autoencoder_that_overflows_is_finite(overflowing, tmp_path):
    pairs = Pairs(str(write_four_pairs(tmp_path / "pairs.parquet")))
    cache = Cache(tmp_path / "cache", "sdxl", pairs, resolution=64)
    cache.build(lambda: overflowing.load_pipeline(torch.float16))
    latents = cache.latents(0)
    assert latents.dtype == torch.float16
    assert latents.isfinite().all()


def test_a_panel_of_one_that_overflows_is_not_black(overflowing, tmp_path):
    pipe = overflowing.load_pipeline(torch.float16)
    card = AnchorCard(base_model=overflowing.source, family="sdxl", method="lora", beta=None)
    save_anchor(tmp_path, tiny_lora(tiny_pipeline("sdxl").unet), card)
    anchor = load_anchor(tmp_path)
    rows = encode_prompts(pipe, ["a fox"], 5.0)
    options = {"resolution": 64, "steps": 1, "guidance_scale": 5.0}
    sheet = sample_panel(pipe, anchor, ["a fox"], rows, [0.5], **options)
    image = np.asarray(sheet.convert("L")).astype(float)[30:100, 4:90]
    assert image.std() > 1


def test_the_key_of_a_cache_tells_in_which_precision_the_autoencoder_encoded(overflowing, silent):
    """So a cache of NaN, from before, is not read."""
    keys = {}
    for precision in ("fp16", "bf16"):
        for base in (overflowing, silent):
            config = replace(small_run(Path(base.source), Path("runs")), precision=precision)
            keys[precision, base.source] = run_encoders_key(config, base)
    assert keys["fp16", overflowing.source].endswith("torch.float16, autoencoder in float32")
    assert keys["fp16", silent.source].endswith("torch.float16")
    assert keys["bf16", overflowing.source].endswith("torch.bfloat16")
