"""What encodes: told apart by its files alone, and not loaded where all is encoded."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from deradiff.data.encoders import encoders_without_weights, encoders_key
from deradiff.models.base_model import BaseModel
from deradiff.models.families import family_of
from tests.support.tiny_pipelines import save_tiny
from tests.support.train_runs import go
from train.config import FinetuneConfig

FAMILIES = ["sd15", "sdxl", "sd3", "flux"]


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def add(tensors, name):
    tensors[name] = tensors[name] + 1


def edit(file, **keys):
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_the_key_changes_with_whatever_changes_the_encodings_and_with_nothing_else(
    base_folder, tmp_path
):
    before = encoders_key(BaseModel(str(base_folder)))
    for name, change in {
        "vae": lambda b: rewrite(
            b / "vae/diffusion_pytorch_model.safetensors", lambda t: add(t, "quant_conv.bias")
        ),
        "scale": lambda b: edit(b / "vae/config.json", scaling_factor=0.5),
        "text": lambda b: rewrite(
            next((b / "text_encoder").glob("*.safetensors")), lambda t: add(t, sorted(t)[0])
        ),
        "tokenizer": lambda b: edit(b / "tokenizer/tokenizer_config.json", model_max_length=7),
    }.items():
        changed = shutil.copytree(base_folder, tmp_path / name)
        assert encoders_key(BaseModel(str(changed))) == before, "a copy is no other model"
        change(changed)
        assert encoders_key(BaseModel(str(changed))) != before, name
    other = shutil.copytree(base_folder, tmp_path / "other")
    rewrite(other / "unet/diffusion_pytorch_model.safetensors", lambda t: add(t, "conv_in.bias"))
    (other / "vae/.DS_Store").write_text("x")
    assert encoders_key(BaseModel(str(other))) == before, "the denoiser encodes nothing"


def test_another_autoencoder_takes_the_place_of_the_bases_own(base_folder, tmp_path):
    own, same, other = (
        encoders_key(BaseModel(str(base_folder))),
        encoders_key(BaseModel(str(base_folder), vae=str(base_folder / "vae"))),
        save_tiny("sd15", tmp_path, seed=1) / "vae",
    )
    keys = {own, same, encoders_key(BaseModel(str(base_folder), vae=str(other)))}
    assert len(keys) == 3
    shutil.copytree(base_folder, tmp_path / "base")
    rewrite(
        tmp_path / "base/vae/diffusion_pytorch_model.safetensors",
        lambda t: add(t, "quant_conv.bias"),
    )
    assert encoders_key(BaseModel(str(tmp_path / "base"), vae=str(base_folder / "vae"))) == same, (
        "its own is not asked for"
    )


def test_a_hub_model_is_told_by_its_commit(monkeypatch, tmp_path):
    def fetch(repo, name, revision=None):
        file = tmp_path / f"snapshots/{repo[-1]}{revision or 'main'}" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            json.dumps(
                {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
            )
        )
        return file

    for module in ("models.base_model", "data.encoders"):
        monkeypatch.setattr(f"deradiff.{module}.fetch", fetch)
    assert (
        encoders_key(BaseModel("a/b")) == "vae=AutoencoderKL a/b@bmain"
        and encoders_key(BaseModel("a/b", "v2")) == "vae=AutoencoderKL a/b@bv2"
    )
    assert encoders_key(BaseModel("a/b", vae="c/d")).endswith(" a/b@bmain c/d@dmain")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pipeline_encodes_and_another_trains_and_neither_holds_the_other(family, tmp_path):
    folder = str(save_tiny(family, tmp_path))
    whole = BaseModel(str(folder)).load_pipeline()
    name = family_of(whole).denoiser
    encodes = BaseModel(str(folder)).load_pipeline(parts={name: None})
    for key, rows in family_of(whole).encode_prompts(whole, ["a", ""]).items():
        assert torch.equal(rows, family_of(encodes).encode_prompts(encodes, ["a", ""])[key])
    described = encoders_without_weights(BaseModel(folder), torch.bfloat16)
    trains = BaseModel(str(folder)).load_pipeline(parts=described)
    assert (
        family_of(trains).latent_shape(trains, 64) == family_of(whole).latent_shape(whole, 64)
        and trains.vae.dtype == torch.bfloat16
    )
    assert all(p.is_meta for p in trains.vae.parameters())
    assert [n for n, m in trains.components.items() if isinstance(m, torch.nn.Module)].count(
        "vae"
    ) == 1
    assert {n for n, m in trains.components.items() if isinstance(m, torch.nn.Module)} == {
        "vae",
        name,
    }


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_whose_data_is_encoded_loads_no_encoder(train_config, method, monkeypatch, tmp_path):
    import diffusers
    import transformers

    tuned = replace(train_config, finetune=FinetuneConfig(method=method))
    first = go(replace(tuned, name="first"))

    def refused(*_, **__):
        pytest.fail("an encoder was loaded")

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", refused)
    monkeypatch.setattr(transformers.CLIPTextModel, "from_pretrained", refused)
    monkeypatch.setattr("train.build.encoding_pipeline", refused)
    second = go(replace(tuned, name="second"))
    a, b = (load_file(next(folder.rglob("*.safetensors"))) for folder in (first, second))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
