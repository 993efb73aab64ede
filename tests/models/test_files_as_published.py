"""Base models in the files that people have: variants, shards, both, and what is not complete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from deradiff.models.base_model import BaseModel, check_autoencoder
from deradiff.models.component_files import Component
from deradiff.models.families import FAMILIES
from tests.support.tiny_pipelines import save_tiny, tiny_pipeline

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = Component("unet", "diffusers", "UNet2DConditionModel")
ENCODER = Component("text_encoder", "transformers", "CLIPTextModel")


def save_variant(family: str, folder: Path, shard: str | None = None) -> Path:
    """A pipeline in half precision with `fp16` files alone, sharded where a size is given."""
    pipe = tiny_pipeline(family).to(torch.float16)
    options = {"max_shard_size": shard} if shard else {}
    pipe.save_pretrained(folder, variant="fp16", **options)
    return folder


def weights_of(pipe: object) -> dict[str, torch.Tensor]:
    """The tensors of all networks of a pipeline."""
    state = {}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    return state


def assert_same_weights(pipe: object, expected: dict[str, torch.Tensor]) -> None:
    weights = weights_of(pipe)
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert torch.equal(value, expected[name].to(value.dtype)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_with_fp16_files_alone_loads_in_every_family(family, tmp_path):
    base = BaseModel(str(save_variant(family, tmp_path / "base")))
    base.check()
    pipe = base.load_pipeline()
    assert getattr(pipe, base.family.denoiser).dtype == torch.float32
    assert_same_weights(pipe, weights_of(tiny_pipeline(family).to(torch.float16)))
    denoiser = base.load_denoiser(torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in denoiser.parameters())
    assert base.load_vae(torch.float16).dtype == torch.float16


def test_shards_of_a_variant_load(tmp_path):
    folder = save_variant("sdxl", tmp_path, shard="30KB")
    assert (folder / "unet/diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    assert (folder / "text_encoder/model.safetensors.index.fp16.json").is_file()
    base = BaseModel(str(folder))
    base.check()
    assert_same_weights(base.load_pipeline(), weights_of(tiny_pipeline("sdxl").to(torch.float16)))


def test_plain_files_come_before_a_variant_component_by_component(tmp_path):
    folder = save_tiny("sdxl", tmp_path)
    save_variant("sdxl", folder)
    (folder / "text_encoder" / "model.safetensors").unlink()
    base = BaseModel(str(folder))
    base.check()
    exact = weights_of(tiny_pipeline("sdxl"))
    rounded = weights_of(tiny_pipeline("sdxl").to(torch.float16))
    expected = {}
    for name, value in exact.items():
        expected[name] = rounded[name] if name.startswith("text_encoder.") else value
    assert_same_weights(base.load_pipeline(), expected)


def test_an_autoencoder_with_a_variant_alone_replaces_the_own(tmp_path, bases):
    folder = tmp_path / "vae"
    tiny_pipeline("sdxl").vae.half().save_pretrained(folder, variant="fp16")
    base = BaseModel(str(bases("sdxl")), vae=str(folder))
    base.check()
    assert base.load_pipeline().vae.dtype == torch.float32
    (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(ValueError, match="vae is not complete: it has no diffusion_pytorch_model"):
        check_autoencoder(str(folder))


def test_the_own_autoencoder_is_not_needed_where_another_replaces_it(tmp_path, bases):
    folder = save_tiny("sdxl", tmp_path)
    shutil.rmtree(folder / "vae")
    BaseModel(str(folder), vae=str(bases("sdxl") / "vae")).check()
    with pytest.raises(ValueError, match=r"it has no vae/config\.json; fetch or copy the rest"):
        BaseModel(str(folder)).check()


def test_a_cached_copy_of_the_hub_with_a_variant_alone_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--org--base"
    save_variant("sd15", repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    base = BaseModel("org/base")
    base.check()
    assert_same_weights(base.load_pipeline(), weights_of(tiny_pipeline("sd15").to(torch.float16)))
    (repo / "snapshots" / COMMIT / "unet/config.json").unlink()
    with pytest.raises(ValueError, match=r"it has no unet/config\.json; .*hf download org/base"):
        BaseModel("org/base").check()


MISSING = (
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "scheduler/scheduler_config.json",
)


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_named(name, tmp_path):
    folder = save_tiny("sd15", tmp_path / "base")
    for file in (folder / name).parent.glob("*") if "tokenizer/" in name else [folder / name]:
        file.unlink()
    with pytest.raises(ValueError, match=f"base is not complete: it has no {name}; "):
        BaseModel(str(folder)).check()


def test_a_component_that_is_not_needed_may_be_missing(tmp_path):
    folder = save_tiny("sd15", tmp_path)
    shutil.rmtree(folder / "text_encoder")
    BaseModel(str(folder)).check(["unet", "scheduler"])


def test_a_missing_shard_and_a_missing_index_are_named(tmp_path):
    folder = save_variant("sd15", tmp_path, shard="50KB")
    shards = sorted((folder / "unet").glob("*.fp16-*"))
    assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(ValueError, match=f"it has no unet/{shards[-1].name}; "):
        BaseModel(str(folder)).check()
    shards[-1].touch()
    (folder / "unet/diffusion_pytorch_model.safetensors.index.fp16.json").unlink()
    with pytest.raises(ValueError, match=r"it has no unet/.*\.index\.fp16\.json; "):
        BaseModel(str(folder)).check()


def test_a_pointer_of_git_lfs_and_a_torn_file_are_refused(tmp_path):
    folder = save_tiny("sd15", tmp_path)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is no safetensors file that can be read"):
        BaseModel(str(folder)).check()
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"is a Git LFS pointer .* run git lfs pull"):
        BaseModel(str(folder)).check()


def test_a_folder_in_float8_without_scales_loads(tmp_path):
    folder = save_tiny("sd15", tmp_path)
    expected = weights_of(BaseModel(str(folder)).load_pipeline())
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        file = folder / f"{name}.safetensors"
        state = {}
        for key, value in load_file(file).items():
            is_float = value.is_floating_point()
            state[key] = value.to(torch.float8_e4m3fn) if is_float else value
            expected[f"{name.split('/')[0]}.{key}"] = state[key].float() if is_float else value
        save_file(state, file, metadata={"format": "pt"})
    base = BaseModel(str(folder))
    base.check()
    assert_same_weights(base.load_pipeline(), expected)


def test_a_folder_in_float8_with_scales_is_refused(tmp_path):
    folder = save_tiny("sd15", tmp_path)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.weight"] = state["conv_in.weight"].to(torch.float8_e4m3fn)
    state["conv_in.scale_weight"] = torch.tensor(2.0)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is float8 with scales, .* give the base in float16"):
        BaseModel(str(folder)).check()


def chosen(component: Component, *names: str) -> str | None:
    weights = component.weights([component.path(name) for name in names])
    return weights.files[0] if weights else None


def test_the_copy_that_is_read_is_chosen_by_names_alone():
    plain = "diffusion_pytorch_model.safetensors"
    half = "diffusion_pytorch_model.fp16.safetensors"
    pickled = "diffusion_pytorch_model.bin"
    others = "diffusion_pytorch_model.non_ema.safetensors"
    assert chosen(UNET, half, plain, pickled) == f"unet/{plain}"
    assert chosen(UNET, half, pickled) == f"unet/{pickled}"
    assert chosen(UNET, others, half) == f"unet/{half}"
    assert chosen(UNET, others) == f"unet/{others}"
    assert chosen(UNET, "model.safetensors") is None
    assert chosen(ENCODER, "pytorch_model.fp16.bin", "model.fp16.safetensors") == (
        "text_encoder/model.fp16.safetensors"
    )


def test_shards_with_their_variant_at_the_end_are_of_that_variant():
    names = [f"unet/diffusion_pytorch_model-0000{number}-of-00002.fp16.bin" for number in (1, 2)]
    weights = UNET.weights(names)
    assert weights is not None
    assert (weights.variant, weights.missing) == ("fp16", None)
    assert weights.files == tuple(names)


def test_a_component_that_the_index_has_none_of_is_not_needed(tmp_path):
    folder = save_tiny("sd15", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["image_encoder"] == [None, None]
    BaseModel(str(folder)).check()
