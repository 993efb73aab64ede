"""What encodes: told apart by its files alone, and not loaded where everything is encoded."""

import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deradiff.data.encoders import encoders_key, encoders_without_weights
from deradiff.models.base_model import BaseModel
from deradiff.models.families import FAMILIES, family_of
from tests.support.tiny_pipelines import save_tiny
from tests.support.train_runs import go
from train.config import FinetuneConfig

VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def change_weight(file, name=None):
    """Add 1 to one tensor of a file; None: the first by name."""
    tensors = load_file(file)
    name = name or min(tensors)
    tensors[name] = tensors[name] + 1
    save_file(tensors, file)


def change_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_autoencoder(base):
    change_weight(base / VAE_WEIGHTS, "quant_conv.bias")


def change_scale(base):
    change_json(base / "vae/config.json", scaling_factor=0.5)


def change_text_encoder(base):
    change_weight(next((base / "text_encoder").glob("*.safetensors")))


def change_tokenizer(base):
    change_json(base / "tokenizer/tokenizer_config.json", model_max_length=7)


def key_of(folder, **options):
    return encoders_key(BaseModel(str(folder), **options))


@pytest.mark.parametrize(
    "change", [change_autoencoder, change_scale, change_text_encoder, change_tokenizer]
)
def test_the_key_changes_with_whatever_changes_the_encodings(base_folder, tmp_path, change):
    before = key_of(base_folder)
    copy = shutil.copytree(base_folder, tmp_path / "copy")
    assert key_of(copy) == before, "a copy is no other model"
    change(copy)
    assert key_of(copy) != before


def test_the_key_does_not_change_with_what_encodes_nothing(base_folder, tmp_path):
    copy = shutil.copytree(base_folder, tmp_path / "copy")
    change_weight(copy / UNET_WEIGHTS, "conv_in.bias")
    (copy / "vae/.DS_Store").write_text("x")
    assert key_of(copy) == key_of(base_folder)


def test_another_autoencoder_takes_the_place_of_the_bases_own(base_folder, tmp_path):
    vae = str(base_folder / "vae")
    other_vae = str(save_tiny("sd15", tmp_path, seed=1) / "vae")
    key = key_of(base_folder, vae=vae)
    assert len({key_of(base_folder), key, key_of(base_folder, vae=other_vae)}) == 3

    # The base's own is not looked at
    copy = shutil.copytree(base_folder, tmp_path / "base")
    change_autoencoder(copy)
    assert key_of(copy, vae=vae) == key


def test_a_hub_model_is_told_by_its_commit(monkeypatch, tmp_path):
    index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}

    def fetch(repo, name, revision=None):
        file = tmp_path / f"snapshots/{repo[-1]}{revision or 'main'}" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(index))
        return file

    for module in ("models.base_model", "data.encoders"):
        monkeypatch.setattr(f"deradiff.{module}.fetch", fetch)
    assert key_of("a/b") == "vae=AutoencoderKL a/b@bmain"
    assert key_of("a/b", revision="v2") == "vae=AutoencoderKL a/b@bv2"
    assert key_of("a/b", vae="c/d").endswith(" a/b@bmain c/d@dmain")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pipeline_encodes_and_another_trains_and_neither_holds_the_other(family, bases):
    base = BaseModel(str(bases(family)))
    complete = base.load_pipeline()
    family = family_of(complete)

    # The one that encodes has no denoiser
    encodes = base.load_pipeline(parts={family.denoiser: None})
    embeddings = family.encode_prompts(encodes, ["a", ""])
    for name, rows in family.encode_prompts(complete, ["a", ""]).items():
        assert torch.equal(rows, embeddings[name])

    # The one that trains has no text encoder, and of the autoencoder only what it is
    trains = base.load_pipeline(parts=encoders_without_weights(base, torch.bfloat16))
    assert family.latent_shape(trains, 64) == family.latent_shape(complete, 64)
    assert trains.vae.dtype == torch.bfloat16
    assert all(parameter.is_meta for parameter in trains.vae.parameters())
    networks = []
    for name, part in trains.components.items():
        if isinstance(part, torch.nn.Module):
            networks.append(name)
    assert sorted(networks) == sorted(["vae", family.denoiser])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_whose_data_is_encoded_loads_no_encoder(train_config, method, monkeypatch):
    config = replace(train_config, finetune=FinetuneConfig(method=method))
    first = go(replace(config, name="first"))

    def refuse(*_, **__):
        pytest.fail("an encoder was loaded")

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.CLIPTextModel, "from_pretrained", refuse)
    monkeypatch.setattr("train.build.encoding_pipeline", refuse)
    second = go(replace(config, name="second"))

    expected = load_file(next(first.rglob("*.safetensors")))
    weights = load_file(next(second.rglob("*.safetensors")))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name])
