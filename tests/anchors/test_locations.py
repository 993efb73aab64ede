"""Anchors in folders of the hub's repositories, and of local ones."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from peft import get_peft_model
from safetensors import safe_open

from deradiff.anchors.anchor import load_anchor
from tests.support.anchor_files import assert_acts_as, denoiser_of, layers_of, merged
from tests.support.tiny_pipelines import perturbed_denoiser, save_tiny, tiny_lora

RUN = "flow_lr3e-5/epoch-0000005"
LORA = tiny_lora(denoiser_of("sd3"), rank=4, alpha=8)
NETWORK = perturbed_denoiser(denoiser_of("sd15"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository as people publish anchors: a LoRA for each epoch, networks, and files."""
    folder = tmp_path_factory.mktemp("repository")
    model = get_peft_model(copy.deepcopy(denoiser_of("sd3")), LORA.peft_config["default"])
    state = {f"base_model.model.{key}": value for key, value in LORA.state_dict().items()}
    model.load_state_dict(state)
    model.save_pretrained(folder / RUN)
    model.save_pretrained(folder / "flow_lr3e-5" / "epoch-0000010")
    NETWORK.save_pretrained(folder / "full" / "unet")
    save_tiny("sdxl", folder / "whole" / "pipeline")
    weights = folder / "full" / "unet" / "diffusion_pytorch_model.safetensors"
    (folder / "files").mkdir()
    shutil.copy(weights, folder / "files" / "model.safetensors")
    (folder / "README.md").write_text("hello")
    return folder


@pytest.fixture
def hub(repository, monkeypatch):
    """A hub that answers for `org/anchors`; the files that are fetched from it."""
    fetched = []

    def listing(repo, revision):
        if repo != "org/anchors":
            raise OSError("RepositoryNotFoundError")
        files = [file for file in repository.rglob("*") if file.is_file()]
        return repo, [file.relative_to(repository).as_posix() for file in files]

    def fetch(repo, name, revision=None):
        fetched.append((name, revision))
        return repository / name

    def header(repo, name, revision):
        with safe_open(repository / name, "pt") as opened:
            return SimpleNamespace(tensors=dict.fromkeys(opened.keys()), metadata={})

    monkeypatch.setattr("deradiff.hub.listing", listing)
    monkeypatch.setattr("deradiff.hub.fetch", fetch)
    monkeypatch.setattr("deradiff.anchors.anchor.parse_safetensors_file_metadata", header)
    return fetched


@pytest.fixture
def cache(repository, tmp_path, monkeypatch):
    """The cached copy of `org/anchors`, with nobody to answer."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    copied = tmp_path / "models--org--anchors"
    shutil.copytree(repository, copied / "snapshots" / "abc")
    (copied / "refs").mkdir()
    (copied / "refs" / "main").write_text("abc")


def test_a_lora_of_peft_in_a_folder_has_its_config_read(hub):
    anchor = load_anchor(f"org/anchors/{RUN}", revision="v1")
    assert (anchor.method, anchor.root) == ("lora", "org/anchors")
    assert anchor.weights == f"{RUN}/adapter_model.safetensors"
    assert (anchor.peft["r"], anchor.peft["lora_alpha"]) == (4, 8)
    assert anchor.source == f"org/anchors/{RUN}"
    # No weight yet.
    assert hub == [(f"{RUN}/adapter_config.json", "v1")]
    assert_acts_as("sd3", anchor, merged("sd3", layers_of(LORA)))
    assert hub[1:] == [(f"{RUN}/adapter_model.safetensors", "v1")]


def test_the_folder_may_be_an_argument(hub):
    for subfolder in (RUN, f"/{RUN}/"):
        anchor = load_anchor("org/anchors", subfolder=subfolder)
        assert anchor == load_anchor(f"org/anchors/{RUN}")
    parts = RUN.split("/")
    assert load_anchor(f"org/anchors/{parts[0]}", subfolder=parts[1]).source == anchor.source


def test_a_file_in_a_folder(hub):
    for source in (f"org/anchors/{RUN}/adapter_model.safetensors",):
        anchor = load_anchor(source)
        assert anchor.peft["lora_alpha"] == 8
        assert_acts_as("sd3", anchor, merged("sd3", layers_of(LORA)))
    anchor = load_anchor("org/anchors/files/model.safetensors")
    assert (anchor.method, anchor.weights) == ("full", "files/model.safetensors")
    assert_acts_as("sd15", anchor, NETWORK, atol=1e-6)
    assert load_anchor("org/anchors/files").weights == "files/model.safetensors"


def test_a_network_in_a_folder(hub):
    anchor = load_anchor("org/anchors/full")
    assert (anchor.method, anchor.weights, anchor.family) == ("full", "full/unet", "sd15")
    assert load_anchor("org/anchors/full/unet").weights == "full/unet"
    whole = load_anchor("org/anchors/whole/pipeline")
    assert (whole.weights, whole.family) == ("whole/pipeline/unet", "sdxl")
    assert whole.prediction == "epsilon"
    part = load_anchor("org/anchors/whole/pipeline/unet")
    assert (part.weights, part.prediction) == ("whole/pipeline/unet", "epsilon")


def test_the_cached_copy_serves_where_nobody_answers(cache):
    lora = load_anchor(f"org/anchors/{RUN}")
    assert_acts_as("sd3", lora, merged("sd3", layers_of(LORA)))
    network = load_anchor("org/anchors/full")
    assert_acts_as("sd15", network, NETWORK, atol=1e-6)
    file = load_anchor("org/anchors", subfolder="files")
    assert_acts_as("sd15", file, NETWORK, atol=1e-6)
    assert load_anchor("org/anchors/whole/pipeline/unet").prediction == "epsilon"


def test_a_local_folder_has_folders_too(repository):
    anchor = load_anchor(repository, subfolder=RUN)
    assert anchor.source == f"{repository}/{RUN}"
    assert anchor.peft["lora_alpha"] == 8
    file = load_anchor(repository, subfolder="files/model.safetensors")
    assert file.method == "full"


def test_a_repository_says_where_its_weights_lie(hub):
    places = r"weights lie in files, flow_lr3e-5/epoch-0000005, flow_lr3e-5/epoch-0000010, full/"
    with pytest.raises(ValueError, match=f"it holds neither a network .*; {places}"):
        load_anchor("org/anchors")
    with pytest.raises(ValueError, match=f"org/anchors on the hub has no epoch-5; {places}"):
        load_anchor("org/anchors/epoch-5")
    with pytest.raises(ValueError, match=r"there is no anchor org/none/x on this"):
        load_anchor("org/none/x")


def test_a_config_that_means_more_than_a_lora_is_seen_in_a_folder(repository, tmp_path):
    folder = shutil.copytree(repository / RUN, tmp_path / "run")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["modules_to_save"] = ["proj_out"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="changes more than its LoRA layers"):
        load_anchor(tmp_path, subfolder="run")


def test_a_name_with_brackets_is_a_name(tmp_path):
    folder = tmp_path / "run [1]"
    denoiser_of("sd15").save_pretrained(folder / "unet")
    anchor = load_anchor(folder)
    assert anchor.family == "sd15"
    network = anchor.network(denoiser_of("sd15"), torch.device("cpu"), torch.float32)
    assert network.config.cross_attention_dim == denoiser_of("sd15").config.cross_attention_dim
