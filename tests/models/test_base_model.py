"""A base model is found, read and loaded; what cannot work is refused before a weight is read."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL

from deradiff.models.base_model import BaseModel, check_autoencoder
from deradiff.models.families import FAMILIES, family_of
from tests.support.tiny_pipelines import save_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_pipeline_is_under_two_megabytes_and_loads(bases, family, pipes):
    folder = bases(family)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 2_000_000

    base = BaseModel(str(folder))
    assert base.family.name == family
    pipe = base.load_pipeline(torch.bfloat16)
    assert family_of(pipe).name == family

    denoiser = getattr(pipe, base.family.denoiser)
    assert denoiser.dtype == torch.bfloat16
    loaded = denoiser.state_dict()
    for name, value in getattr(pipes[family], base.family.denoiser).state_dict().items():
        assert torch.equal(value.bfloat16(), loaded[name])


def write_index(folder, index, **changes):
    (folder / "model_index.json").write_text(json.dumps(index | changes))


def test_a_checkpoint_saved_as_another_kind_loads_as_text_to_image(bases, tmp_path):
    index = json.loads((bases("sd15") / "model_index.json").read_text())
    kinds = {"StableDiffusionInpaintPipeline": "sd15", "StableDiffusionXLImg2ImgPipeline": "sdxl"}
    for name, family in kinds.items():
        write_index(tmp_path, index, _class_name=name)
        assert BaseModel(str(tmp_path)).family.name == family


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "StableDiffusionUpscalePipeline"},
        {"unet": ["diffusers", "UNet3DConditionModel"]},
        {"unet": None},
    ],
)
def test_a_checkpoint_of_no_family_is_refused(bases, tmp_path, changes):
    index = json.loads((bases("sd15") / "model_index.json").read_text())
    write_index(tmp_path, index, **changes)
    with pytest.raises(ValueError, match="belongs to no family"):
        _ = BaseModel(str(tmp_path)).family


@pytest.mark.parametrize("source", ["./none", "runs/train/none", "none", "a/b/c"])
def test_a_base_that_is_no_folder_and_no_id_is_refused_at_once(source):
    with pytest.raises(ValueError, match="there is no pipeline folder"):
        _ = BaseModel(source).family


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a diffusers pipeline: it has no model_index"):
        _ = BaseModel(str(tmp_path)).index


def test_an_autoencoder_in_place_of_its_own_is_loaded(bases, tmp_path):
    other = str(save_tiny("sd15", tmp_path, seed=1) / "vae")
    base = BaseModel(str(bases("sdxl")), vae=other)
    base.check()
    weights = base.load_pipeline().vae.state_dict()
    expected = AutoencoderKL.from_pretrained(other).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)

    own = BaseModel(str(bases("sdxl"))).load_vae(torch.float32).state_dict()
    assert not all(torch.equal(weights[name], own[name]) for name in own)


def test_an_autoencoder_that_is_not_there_is_refused_before_anything_is_loaded(bases, tmp_path):
    message = "vae=.* is no autoencoder's folder: it has no config.json"
    with pytest.raises(ValueError, match=message):
        BaseModel(str(bases("sd15")), vae=str(tmp_path)).check()
    with pytest.raises(ValueError, match=message):
        check_autoencoder("no folder")


def test_small_files_are_read_without_weights(bases):
    base = BaseModel(str(bases("sdxl")))
    assert base.read_json("scheduler/scheduler_config.json")["_class_name"] == "DDIMScheduler"
    assert base.denoiser_config["addition_embed_type"] == "text_time"
    with pytest.raises(ValueError, match=r"is not complete: it has no none\.json"):
        base.read_json("none.json")
