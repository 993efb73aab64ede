"""Anchors on disk: what stock diffusers reads back, what is recognised, and what is refused before a weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import constants

from deradiff.anchors.anchor import (
    AnchorCard,
    check_anchor_family,
    load_anchor,
    read_card,
    save_anchor,
)
from tests.support.tiny_pipelines import (
    perturbed_denoiser,
    save_tiny,
    tiny_denoiser,
    tiny_lora,
    tiny_pipeline,
)

CONTRACT = {
    "base_model",
    "base_revision",
    "family",
    "method",
    "beta",
    "beta_convention",
    "objective",
    "steps",
    "pairs_seen",
    "dataset",
    "seed",
    "vae",
    "git_commit",
    "versions",
    "gpu_hours",
    "device",
    "flops",
}


def card(method: str = "full", family: str = "sd15", **values) -> AnchorCard:
    return AnchorCard(
        **({"base_model": "org/base", "family": family, "method": method, "beta": 2000.0} | values)
    )


def eps(unet, family: str = "sd15"):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(
        2, 7, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1)
    )
    added = (
        {"text_embeds": text[:, 0, :32], "time_ids": torch.full((2, 6), 64.0)}
        if family == "sdxl"
        else None
    )
    with torch.no_grad():
        return unet(x, torch.tensor(500), text, added_cond_kwargs=added).sample


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_lora_anchor_loads_in_stock_diffusers_with_its_alpha(tmp_path, family):
    pipe = tiny_pipeline(family)
    trained = tiny_lora(pipe.unet, rank=4, alpha=8)
    save_anchor(tmp_path, trained, card("lora", family))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "anchor.json",
        "pytorch_lora_weights.safetensors",
    ]
    base = eps(pipe.unet, family)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(eps(pipe.unet, family), eps(trained, family))
    assert not torch.equal(base, eps(trained, family))


def test_a_full_anchor_loads_in_stock_diffusers(tmp_path):
    trained = perturbed_denoiser(tiny_denoiser("sd15"))
    save_anchor(tmp_path, trained, card())
    assert torch.equal(
        eps(UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")), eps(trained)
    )


def test_the_card_keeps_the_contract_and_ignores_what_it_does_not_know(tmp_path):
    written = card("lora", steps=7, versions={"torch": "2"}, flops=1e18, gpu_hours=0.5)
    save_anchor(tmp_path, tiny_lora(tiny_denoiser("sd15")), written)
    values = json.loads((tmp_path / "anchor.json").read_text())
    assert set(values) == CONTRACT and values["beta_convention"] == "mean-half"
    (tmp_path / "anchor.json").write_text(json.dumps(values | {"a_later_key": 1}))
    assert read_card(tmp_path) == written


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"beta": 0}, "beta is a number above 0"),
        ({"beta": "big"}, "beta is a number"),
        ({"method": "dora"}, "lora or full"),
    ],
)
def test_a_card_that_cannot_be_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        card(**change)


def test_an_incomplete_card_is_refused_by_its_key(tmp_path):
    save_anchor(tmp_path, tiny_lora(tiny_denoiser("sd15")), card("lora"))
    (tmp_path / "anchor.json").write_text('{"base_model": "x", "family": "sd15", "method": "lora"}')
    with pytest.raises(ValueError, match=r"anchor.json is incomplete.*beta"):
        read_card(tmp_path)


def without_weights(folder: Path) -> Path:
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


def test_what_other_trainers_wrote_is_recognised_without_weights(tmp_path):
    for family in ("sd15", "sdxl"):
        whole = without_weights(save_tiny(family, tmp_path / family))
        anchor = load_anchor(whole)
        assert (anchor.method, anchor.weights, anchor.family, anchor.card) == (
            "full",
            "unet",
            family,
            None,
        )
        at_root = load_anchor(whole / "unet")
        assert (at_root.method, at_root.weights, at_root.family) == ("full", "", family)
        (whole / "model_index.json").unlink()
        assert load_anchor(whole).family == family
    lora = tmp_path / "lora"
    save_anchor(lora, tiny_lora(tiny_denoiser("sd15")), card("lora"))
    (lora / "anchor.json").unlink()
    (lora / "pytorch_lora_weights.safetensors").rename(lora / "theirs.safetensors")
    for source in (lora, lora / "theirs.safetensors"):
        anchor = load_anchor(source)
        assert (anchor.method, anchor.weights, anchor.family, anchor.card) == (
            "lora",
            "theirs.safetensors",
            None,
            None,
        )
    shutil.copy(lora / "theirs.safetensors", lora / "webui.safetensors")
    with pytest.raises(
        ValueError,
        match=r"several files \(theirs.safetensors, webui.safetensors\): add the file's name",
    ):
        load_anchor(lora)
    assert load_anchor(lora / "webui.safetensors").weights == "webui.safetensors"


def test_a_hub_id_is_found_in_the_cache_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--aligned"
    save_tiny("sdxl", repo / "snapshots" / "abc")
    shutil.copy(
        repo / "snapshots/abc/unet/diffusion_pytorch_model.safetensors",
        repo / "snapshots/abc/style.safetensors",
    )
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    anchor = load_anchor("org/aligned")
    assert (anchor.source, anchor.method, anchor.weights, anchor.family) == (
        "org/aligned",
        "full",
        "unet",
        "sdxl",
    )
    assert (
        eps(anchor.network(tiny_denoiser("sdxl"), torch.device("cpu"), torch.float32), "sdxl")
        .isfinite()
        .all()
    )
    assert load_anchor("org/aligned/style.safetensors").method == "full"


@pytest.mark.parametrize(
    "source", ["runs/train/none/anchor", "./none", "none", "a/b/c/d", "nobody/nothing"]
)
def test_a_missing_anchor_is_told_in_one_sentence(source):
    with pytest.raises(ValueError, match=r"there is no anchor .*hub id such as org/name") as error:
        read_card(source)
    assert "\n" not in str(error.value)


def test_a_folder_of_something_else_is_no_anchor(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(
        ValueError,
        match=r"no anchor that deradiff can read: it holds neither a unet/ nor a transformer/ nor a LoRA file",
    ):
        load_anchor(tmp_path)


def test_an_anchor_of_another_family_is_refused_before_its_weights_are_read(tmp_path):
    save_anchor(tmp_path / "ours", tiny_denoiser("sdxl"), card(family="sdxl"))
    save_tiny("sdxl", tmp_path / "theirs")
    for source in (tmp_path / "ours", tmp_path / "theirs", tmp_path / "theirs" / "unet"):
        without_weights(source)
        assert check_anchor_family(source, "sdxl").family == "sdxl"
        with pytest.raises(
            ValueError, match=r"the anchor .* is of family sdxl and the pipeline of sd15"
        ):
            check_anchor_family(source, "sd15")


def test_pickled_weights_are_not_read(tmp_path):
    unet = tiny_denoiser("sd15")
    unet.save_pretrained(tmp_path / "unet", safe_serialization=False)
    anchor = load_anchor(tmp_path)
    with pytest.raises(ValueError, match="holds no safetensors weights"):
        anchor.network(unet, torch.device("cpu"), torch.float32)


def test_a_network_is_kept_and_never_cast_down_and_up_again(tmp_path):
    unet = perturbed_denoiser(tiny_denoiser("sd15"))
    save_anchor(tmp_path, unet, card())
    anchor, cpu = load_anchor(tmp_path), torch.device("cpu")
    first = anchor.network(unet, cpu, torch.float32)
    assert anchor.network(unet, cpu, torch.float32) is first and load_anchor(anchor) is anchor
    assert anchor.network(unet, cpu, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(eps(anchor.network(unet, cpu, torch.float32)), eps(unet))


def test_a_train_runs_directory_stands_for_its_anchor(tmp_path):
    save_anchor(tmp_path / "run" / "anchor", tiny_denoiser("sd15"), card())
    (tmp_path / "run" / "config.yaml").write_text("")
    anchor = load_anchor(tmp_path / "run")
    assert (
        anchor.card == card() and anchor.method == "full" and anchor.source == str(tmp_path / "run")
    )
    assert Path(anchor.root) == tmp_path / "run" / "anchor"


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_transformer_folder_says_its_family_itself(tmp_path, family):
    transformer = tiny_denoiser(family)
    transformer.save_pretrained(tmp_path / "transformer")
    for source, weights in ((tmp_path, "transformer"), (tmp_path / "transformer", "")):
        anchor = load_anchor(source)
        assert (anchor.method, anchor.weights, anchor.family) == ("full", weights, family)
        assert type(anchor.network(transformer, torch.device("cpu"), torch.float32)) is type(
            transformer
        )
    without_weights(tmp_path)
    with pytest.raises(ValueError, match=f"is of family {family} and the pipeline of sdxl"):
        check_anchor_family(tmp_path, "sdxl")


@pytest.mark.parametrize("size", ["10GB", "100KB"], ids=["one file", "shards"])
def test_weights_in_the_fp16_variant_alone_are_found(tmp_path, size):
    unet, cpu = perturbed_denoiser(tiny_denoiser("sd15")), torch.device("cpu")
    unet.save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size=size)
    assert load_anchor(tmp_path).variant == load_anchor(tmp_path / "unet").variant == "fp16"
    assert torch.equal(eps(load_anchor(tmp_path).network(unet, cpu, torch.float32)), eps(unet))
    unet.save_pretrained(tmp_path / "unet", max_shard_size=size)
    assert load_anchor(tmp_path).variant is None and load_anchor(tmp_path / "unet").variant is None


def test_a_network_with_missing_weights_is_not_filled_with_random_ones(tmp_path):
    unet = tiny_denoiser("sd15")
    tiny_lora(unet).save_pretrained(
        tmp_path / "unet"
    )  # its layers are saved wrapped: `to_q.base_layer.weight`
    with pytest.raises(
        ValueError, match=r"holds no whole UNet2DConditionModel: .*weight is missing"
    ):
        load_anchor(tmp_path).network(unet, torch.device("cpu"), torch.float32)


def test_a_card_of_another_family_is_seen_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("deradiff.hub.fetch", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("deradiff.hub.listing", lambda *_: pytest.fail("asked"))
    save_anchor(
        tmp_path, tiny_lora(tiny_denoiser("sdxl")), card("lora", "sdxl", base_model="org/base")
    )
    with pytest.raises(ValueError, match="is of family sdxl and the pipeline of sd15"):
        check_anchor_family(tmp_path, "sd15")


def test_a_file_of_the_hub_is_told_by_its_header(monkeypatch):
    """By stand-ins for the hub's client: a LoRA and a checkpoint, of which no weight is asked for."""
    headers = {
        "lora.safetensors": ["unet.x.lora_A.weight"],
        "model.safetensors": ["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"],
    }
    monkeypatch.setattr(
        "deradiff.hub.listing", lambda repo, revision: (repo, [*headers, "README.md"])
    )
    monkeypatch.setattr(
        "deradiff.anchors.anchor.parse_safetensors_file_metadata",
        lambda repo, name, revision: SimpleNamespace(tensors=dict.fromkeys(headers[name])),
    )
    lora, model = (load_anchor(f"org/aligned/{name}") for name in headers)
    assert (lora.method, lora.family, lora.root) == ("lora", None, "org/aligned")
    assert (model.method, model.family, model.weights) == ("full", "sd3", "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"several files .lora.safetensors, model.safetensors.: add the file's name",
    ):
        load_anchor("org/aligned")
