"""Anchors on disk: what stock diffusers reads back, what is recognised, and what is refused before
a weight is read."""

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
from deradiff.anchors.weight_files import read_tensors
from tests.support.tiny_pipelines import (
    perturbed_denoiser,
    save_tiny,
    tiny_denoiser,
    tiny_lora,
    tiny_pipeline,
)

CPU = torch.device("cpu")
LORA = "pytorch_lora_weights.safetensors"
UNET = "diffusion_pytorch_model.safetensors"

# The keys of anchor.json, on which others rely.
CONTRACT = {
    "digest",
    "weights_digest",
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
    "reward",
    "seed",
    "vae",
    "git_commit",
    "versions",
    "gpu_hours",
    "device",
    "flops",
}


def card(method: str = "full", family: str = "sd15", **values) -> AnchorCard:
    defaults = {"base_model": "org/base", "family": family, "method": method, "beta": 2000.0}
    return AnchorCard(**(defaults | values))


def predict(unet, family: str = "sd15"):
    """A UNet's output on one input."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    width = unet.config.cross_attention_dim
    text = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(1))
    added = None
    if family == "sdxl":
        added = {"text_embeds": text[:, 0, :32], "time_ids": torch.full((2, 6), 64.0)}
    with torch.no_grad():
        return unet(x, torch.tensor(500), text, added_cond_kwargs=added).sample


def remove_weights(folder: Path) -> Path:
    """Remove all weights below a folder, so that nothing can read them."""
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


def kind_of(anchor):
    """What is recognised of an anchor's files."""
    return anchor.method, anchor.weights, anchor.family, anchor.card


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_lora_anchor_loads_in_stock_diffusers_with_its_alpha(tmp_path, family):
    pipe = tiny_pipeline(family)
    trained = tiny_lora(pipe.unet, rank=4, alpha=8)
    save_anchor(tmp_path, trained, card("lora", family))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anchor.json", LORA]
    base = predict(pipe.unet, family)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(predict(pipe.unet, family), predict(trained, family))
    assert not torch.equal(base, predict(trained, family))


def test_a_full_anchor_loads_in_stock_diffusers(tmp_path):
    trained = perturbed_denoiser(tiny_denoiser("sd15"))
    save_anchor(tmp_path, trained, card())
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert torch.equal(predict(loaded), predict(trained))


def test_the_card_keeps_the_contract_and_ignores_what_it_does_not_know(tmp_path):
    written = card("lora", steps=7, versions={"torch": "2"}, flops=1e18, gpu_hours=0.5)
    save_anchor(tmp_path, tiny_lora(tiny_denoiser("sd15")), written)
    values = json.loads((tmp_path / "anchor.json").read_text())
    assert set(values) == CONTRACT
    assert values["beta_convention"] == "mean-half"
    del values["digest"]
    (tmp_path / "anchor.json").write_text(json.dumps(values | {"a_later_key": 1}))
    assert read_card(tmp_path) == written

    # A card of an earlier version says nothing of the reward.
    del values["reward"]
    (tmp_path / "anchor.json").write_text(json.dumps(values))
    assert read_card(tmp_path) == written


def flip(file, position=-1, bit=0):
    """Change one bit of a file."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_that_are_not_what_was_written_are_refused(tmp_path, method):
    like = tiny_denoiser("sd15")
    file = tmp_path / ("unet/config.json" if method == "full" else LORA)
    network = tiny_lora(like) if method == "lora" else like
    save_anchor(tmp_path, network, card(method))
    load_anchor(tmp_path).check_weights()

    flip(file, position=-30)
    anchor = load_anchor(tmp_path)
    message = f"weights of the anchor {tmp_path} are not those that its card anchor.json was"
    with pytest.raises(ValueError, match=message):
        anchor.check_weights()
    with pytest.raises(ValueError, match=message):
        if method == "full":
            anchor.network(like, CPU, torch.float32)
        else:
            anchor.lora(tiny_pipeline("sd15"))

    # Cards of earlier versions, and of those who changed something, hold no digest.
    values = json.loads((tmp_path / "anchor.json").read_text())
    del values["digest"], values["weights_digest"]
    (tmp_path / "anchor.json").write_text(json.dumps(values))
    load_anchor(tmp_path).check_weights()


def test_a_card_that_is_not_what_was_written_is_refused(tmp_path):
    save_anchor(tmp_path, tiny_lora(tiny_denoiser("sd15")), card("lora"))
    file = tmp_path / "anchor.json"
    whole = file.read_text()
    for before, after in (('"beta": 2', '"beta": 3'), ('"seed"', '"sead"')):
        assert before in whole
        file.write_text(whole.replace(before, after))
        with pytest.raises(ValueError, match=r"anchor.json cannot be used \(it is not what was"):
            read_card(tmp_path)


def test_equal_anchors_are_equal_files(tmp_path):
    for attempt in range(4):
        save_anchor(tmp_path / str(attempt), tiny_lora(tiny_denoiser("sd15")), card("lora"))
    assert len({(tmp_path / str(attempt) / LORA).read_bytes() for attempt in range(4)}) == 1
    read_tensors(tmp_path / "0" / LORA, "the anchor")


def test_a_card_names_the_weights_of_a_mixed_reward(tmp_path):
    written = card("lora", reward={"crisp": 0.5, "vivid": 0.5})
    save_anchor(tmp_path, tiny_lora(tiny_denoiser("sd15")), written)
    assert read_card(tmp_path).reward == {"crisp": 0.5, "vivid": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0}, "beta is a number above 0"),
        ({"beta": float("inf")}, "beta is a number above 0"),
        ({"beta": float("nan")}, "beta is a number above 0"),
        ({"beta": 10**400}, "beta is a number above 0"),
        ({"beta": True}, "beta is a number above 0"),
        ({"beta": "big"}, "beta is a number"),
        ({"method": "dora"}, "lora or full"),
    ],
)
def test_a_card_of_unsupported_values_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        card(**change)


def test_an_incomplete_card_is_refused_by_its_key(tmp_path):
    save_anchor(tmp_path, tiny_lora(tiny_denoiser("sd15")), card("lora"))
    (tmp_path / "anchor.json").write_text('{"base_model": "x", "family": "sd15", "method": "lora"}')
    with pytest.raises(ValueError, match=r"anchor.json is incomplete.*beta"):
        read_card(tmp_path)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_whole_pipeline_of_others_is_recognised_without_weights(tmp_path, family):
    whole = remove_weights(save_tiny(family, tmp_path))
    assert kind_of(load_anchor(whole)) == ("full", "unet", family, None)
    assert kind_of(load_anchor(whole / "unet")) == ("full", "", family, None)
    (whole / "model_index.json").unlink()
    assert load_anchor(whole).family == family


def test_a_lora_file_of_others_is_recognised_without_weights(tmp_path):
    save_anchor(tmp_path, tiny_lora(tiny_denoiser("sd15")), card("lora"))
    (tmp_path / "anchor.json").unlink()
    (tmp_path / LORA).rename(tmp_path / "theirs.safetensors")
    for source in (tmp_path, tmp_path / "theirs.safetensors"):
        assert kind_of(load_anchor(source)) == ("lora", "theirs.safetensors", None, None)

    # Of several files one has to be named.
    shutil.copy(tmp_path / "theirs.safetensors", tmp_path / "webui.safetensors")
    several = r"several files \(theirs.safetensors, webui.safetensors\): add the file's name"
    with pytest.raises(ValueError, match=several):
        load_anchor(tmp_path)
    assert load_anchor(tmp_path / "webui.safetensors").weights == "webui.safetensors"


def test_a_hub_id_is_found_in_the_cache_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--aligned"
    snapshot = repo / "snapshots" / "abc"
    save_tiny("sdxl", snapshot)
    shutil.copy(snapshot / "unet" / UNET, snapshot / "style.safetensors")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    anchor = load_anchor("org/aligned")
    assert anchor.source == "org/aligned"
    assert kind_of(anchor) == ("full", "unet", "sdxl", None)
    network = anchor.network(tiny_denoiser("sdxl"), CPU, torch.float32)
    assert predict(network, "sdxl").isfinite().all()
    assert load_anchor("org/aligned/style.safetensors").method == "full"


@pytest.mark.parametrize(
    "source", ["runs/train/none/anchor", "./none", "none", "a/b/c/d", "nobody/nothing"]
)
def test_a_missing_anchor_is_answered_in_one_sentence(source):
    with pytest.raises(
        ValueError, match=r"there is no anchor .*(such as org/name|HF_HOME)"
    ) as error:
        read_card(source)
    assert "\n" not in str(error.value)


def test_a_folder_of_something_else_is_no_anchor(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    message = r"it holds neither a network \(unet/, transformer/, .*\) nor a LoRA file"
    with pytest.raises(ValueError, match=f"no anchor that deradiff can read: {message}"):
        load_anchor(tmp_path)


def test_an_anchor_of_another_family_is_refused_before_its_weights_are_read(tmp_path):
    save_anchor(tmp_path / "ours", tiny_denoiser("sdxl"), card(family="sdxl"))
    save_tiny("sdxl", tmp_path / "theirs")
    message = r"the anchor .* is of family sdxl and the pipeline of sd15"
    for source in (tmp_path / "ours", tmp_path / "theirs", tmp_path / "theirs" / "unet"):
        remove_weights(source)
        assert check_anchor_family(source, "sdxl").family == "sdxl"
        with pytest.raises(ValueError, match=message):
            check_anchor_family(source, "sd15")


def test_a_card_of_another_family_is_seen_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("deradiff.hub.fetch", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.setattr("deradiff.hub.listing", lambda *_: pytest.fail("the hub was asked"))
    other = card("lora", "sdxl", base_model="org/base")
    save_anchor(tmp_path, tiny_lora(tiny_denoiser("sdxl")), other)
    with pytest.raises(ValueError, match="is of family sdxl and the pipeline of sd15"):
        check_anchor_family(tmp_path, "sd15")


def test_a_folder_without_weights_is_refused_when_they_are_read(tmp_path):
    unet = tiny_denoiser("sd15")
    unet.save_pretrained(tmp_path / "unet")
    remove_weights(tmp_path)
    anchor = load_anchor(tmp_path)
    with pytest.raises(ValueError, match="holds no safetensors weights"):
        anchor.network(unet, CPU, torch.float32)


def test_a_network_is_kept_and_never_cast_down_and_up_again(tmp_path):
    unet = perturbed_denoiser(tiny_denoiser("sd15"))
    save_anchor(tmp_path, unet, card())
    anchor = load_anchor(tmp_path)
    assert load_anchor(anchor) is anchor
    first = anchor.network(unet, CPU, torch.float32)
    assert anchor.network(unet, CPU, torch.float32) is first
    assert anchor.network(unet, CPU, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(predict(anchor.network(unet, CPU, torch.float32)), predict(unet))


def test_a_train_runs_directory_stands_for_its_anchor(tmp_path):
    save_anchor(tmp_path / "run" / "anchor", tiny_denoiser("sd15"), card())
    (tmp_path / "run" / "config.yaml").write_text("")
    anchor = load_anchor(tmp_path / "run")
    assert anchor.card == card()
    assert anchor.method == "full"
    assert anchor.source == str(tmp_path / "run")
    assert Path(anchor.root) == tmp_path / "run" / "anchor"


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_transformer_folder_says_its_family_itself(tmp_path, family):
    transformer = tiny_denoiser(family)
    transformer.save_pretrained(tmp_path / "transformer")
    for source, weights in ((tmp_path, "transformer"), (tmp_path / "transformer", "")):
        anchor = load_anchor(source)
        assert kind_of(anchor) == ("full", weights, family, None)
        network = anchor.network(transformer, CPU, torch.float32)
        assert type(network) is type(transformer)
    remove_weights(tmp_path)
    with pytest.raises(ValueError, match=f"is of family {family} and the pipeline of sdxl"):
        check_anchor_family(tmp_path, "sdxl")


@pytest.mark.parametrize("size", ["10GB", "100KB"], ids=["one file", "shards"])
def test_weights_in_the_fp16_variant_alone_are_found(tmp_path, size):
    unet = perturbed_denoiser(tiny_denoiser("sd15"))
    unet.save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size=size)
    for source in (tmp_path, tmp_path / "unet"):
        assert load_anchor(source).variant == "fp16"
    network = load_anchor(tmp_path).network(unet, CPU, torch.float32)
    assert torch.equal(predict(network), predict(unet))

    # Beside it, the plain weights are preferred.
    unet.save_pretrained(tmp_path / "unet", max_shard_size=size)
    for source in (tmp_path, tmp_path / "unet"):
        assert load_anchor(source).variant is None


def test_a_network_with_missing_weights_is_not_filled_with_random_ones(tmp_path):
    unet = tiny_denoiser("sd15")
    # Layers with an adapter are saved wrapped: `to_q.base_layer.weight`.
    tiny_lora(unet).save_pretrained(tmp_path / "unet")
    message = r"holds no whole UNet2DConditionModel: .*weight is missing"
    with pytest.raises(ValueError, match=message):
        load_anchor(tmp_path).network(unet, CPU, torch.float32)


def test_a_file_of_the_hub_is_told_by_its_header(monkeypatch):
    """By stand-ins for the hub's client: a LoRA and a checkpoint, of which no weight is read."""
    headers = {
        "lora.safetensors": ["unet.x.lora_A.weight"],
        "model.safetensors": ["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"],
    }

    def listing(repo, revision):
        return repo, [*headers, "README.md"]

    def metadata(repo, name, revision):
        return SimpleNamespace(tensors=dict.fromkeys(headers[name]), metadata={})

    monkeypatch.setattr("deradiff.hub.listing", listing)
    monkeypatch.setattr("deradiff.anchors.anchor.parse_safetensors_file_metadata", metadata)
    lora = load_anchor("org/aligned/lora.safetensors")
    assert (lora.method, lora.family, lora.root) == ("lora", None, "org/aligned")
    model = load_anchor("org/aligned/model.safetensors")
    assert kind_of(model) == ("full", "model.safetensors", "sd3", None)
    several = r"several files .lora.safetensors, model.safetensors.: add the file's name"
    with pytest.raises(ValueError, match=several):
        load_anchor("org/aligned")
