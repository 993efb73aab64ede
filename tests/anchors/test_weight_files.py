"""Files that are torn, not fetched, or pickles: named in one sentence, and never run."""

import os

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from deradiff.anchors.anchor import AnchorCard, load_anchor, save_anchor
from tests.support.anchor_files import (
    assert_acts_as,
    denoiser_of,
    layers_of,
    merged,
    refused,
)
from tests.support.tiny_pipelines import perturbed_denoiser, tiny_lora

LORA = "pytorch_lora_weights.safetensors"
CPU = torch.device("cpu")
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"


def card(method):
    """A card of an SD1.5 anchor."""
    return AnchorCard(base_model="x", family="sd15", method=method, beta=1)


def refused_at_once(source, message, **options):
    """Assert that an anchor is refused in one sentence before it is used."""
    with pytest.raises(ValueError, match=message) as error:
        load_anchor(source, **options)
    assert "\n" not in str(error.value)


def save_lora(folder):
    """A LoRA of SD1.5 in diffusers' format."""
    save_anchor(folder, tiny_lora(denoiser_of("sd15")), card("lora"))
    return folder / LORA


def save_network(folder):
    """A network of SD1.5 in diffusers' layout."""
    save_anchor(folder, perturbed_denoiser(denoiser_of("sd15")), card("full"))
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("save", [save_lora, save_network])
def test_a_pointer_of_git_lfs_is_named(tmp_path, save):
    save(tmp_path).write_text(LFS)
    refused_at_once(tmp_path, r"is a Git LFS pointer and not the weights .*: run git lfs pull")


@pytest.mark.parametrize("save", [save_lora, save_network])
@pytest.mark.parametrize("size", [0, 4, 100, -1], ids=["empty", "no header", "header", "end"])
def test_a_torn_file_is_named(tmp_path, save, size):
    file = save(tmp_path)
    file.write_bytes(file.read_bytes()[:size])
    refused_at_once(tmp_path, r"no safetensors file that can be read .*fetch or copy it again")


def test_one_torn_file_of_several_is_named(tmp_path):
    denoiser_of("sd15").save_pretrained(tmp_path / "unet", max_shard_size="100KB")
    file = max((tmp_path / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])
    refused_at_once(tmp_path, f"no safetensors file that can be read .{file.name}")


def test_a_torn_index_of_several_files_is_named(tmp_path):
    denoiser_of("sd15").save_pretrained(tmp_path / "unet", max_shard_size="100KB")
    index = next((tmp_path / "unet").glob("*.index.json"))
    index.write_text(index.read_text()[:-9])
    refused_at_once(tmp_path, f"{index.name} is no JSON that can be read")


def test_a_file_that_is_missing_among_several_is_named(tmp_path):
    denoiser_of("sd15").save_pretrained(tmp_path / "unet", max_shard_size="100KB")
    max((tmp_path / "unet").glob("*.safetensors")).unlink()
    refused("sd15", tmp_path, r"holds no safetensors weights that diffusers can read: .*-of-")


def test_a_file_of_another_format_is_named(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    refused_at_once(file, r"no safetensors file that can be read .model.gguf")
    refused_at_once(tmp_path, "neither a network")


def test_a_torn_config_is_named(tmp_path):
    save_network(tmp_path)
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet')
    refused_at_once(tmp_path, r"config.json is no JSON that can be read")


@pytest.mark.parametrize(
    "name", ["model.pth", "model.pt", "model.ckpt", "diffusion_pytorch_model.bin"]
)
def test_a_pickle_is_refused_without_the_users_word(tmp_path, name):
    torch.save(denoiser_of("sd15").state_dict(), tmp_path / name)
    message = r"is a pickle .*load_anchor\(..., read_pickled_tensors=True\)"
    refused_at_once(tmp_path / name, message)
    refused_at_once(tmp_path, message)
    # Beside safetensors it is not looked at.
    save_file({"unet.x.lora_A.weight": torch.ones(1)}, tmp_path / LORA)
    assert load_anchor(tmp_path).weights == LORA


WRAPPED = {
    "alone": lambda state: state,
    "checkpoint": lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 1.0}},
    "module": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"module._orig_mod.{key}": v for key, v in state.items()},
    "part": lambda state: {f"unet.{key}": value for key, value in state.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_pickled_network_is_read_on_request(tmp_path, wrap, is_zip):
    """As SDPO publishes it."""
    trained = perturbed_denoiser(denoiser_of("sd15"))
    file = tmp_path / "model.pth"
    torch.save(wrap(trained.state_dict()), file, _use_new_zipfile_serialization=is_zip)
    anchor = load_anchor(file, read_pickled_tensors=True)
    assert (anchor.method, anchor.weights) == ("full", "model.pth")
    network = anchor.network(denoiser_of("sd15"), CPU, torch.float32)
    torch.testing.assert_close(network.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_a_folder_of_diffusers_with_a_pickle_is_read_on_request(tmp_path):
    trained = perturbed_denoiser(denoiser_of("sd15"))
    trained.save_pretrained(tmp_path / "unet", safe_serialization=False)
    refused_at_once(tmp_path, "is a pickle .diffusion_pytorch_model.bin")
    anchor = load_anchor(tmp_path, read_pickled_tensors=True)
    assert anchor.weights == "unet/diffusion_pytorch_model.bin"
    assert anchor.family == "sd15"
    assert_acts_as("sd15", anchor, trained, atol=1e-6)


def test_a_pickled_lora_is_read_on_request(tmp_path):
    lora = tiny_lora(denoiser_of("sd15"), 4, 4)
    state = get_peft_model_state_dict(lora, adapter_name="default")
    torch.save({f"unet.{key}": value for key, value in state.items()}, tmp_path / "lora.bin")
    anchor = load_anchor(tmp_path, read_pickled_tensors=True)
    assert (anchor.method, anchor.weights) == ("lora", "lora.bin")
    assert_acts_as("sd15", anchor, merged("sd15", layers_of(lora)))


class Trap:
    """Runs something where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_nothing_of_a_pickle_is_ever_run(tmp_path):
    sprung = tmp_path / "sprung"
    file = tmp_path / "model.pth"
    torch.save({"x": torch.ones(1), "trap": Trap(sprung)}, file)
    refused_at_once(file, r"is a pickle")
    refused_at_once(file, "holds more than tensors", read_pickled_tensors=True)
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"ema": {"x": torch.ones(1)}, "raw": {"x": torch.ones(1)}},
            r"several sets of weights .ema, raw.",
        ),
        ([torch.ones(1)], "holds no tensors by name"),
        (torch.ones(1), "holds no tensors by name"),
    ],
)
def test_a_pickle_whose_weights_cannot_be_told_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pt")
    refused_at_once(tmp_path / "model.pt", message, read_pickled_tensors=True)


def test_a_torn_pickle_is_named(tmp_path):
    file = tmp_path / "model.pth"
    torch.save({"x": torch.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:-50])
    message = "no file of torch.save that can be read|holds more than tensors"
    refused_at_once(file, message, read_pickled_tensors=True)
    file.write_text(LFS)
    refused_at_once(file, "is a Git LFS pointer", read_pickled_tensors=True)


def test_a_lora_that_is_a_pointer_leaves_the_pipeline_alone(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_text(LFS)
    refused("sd15", file, "run git lfs pull")
