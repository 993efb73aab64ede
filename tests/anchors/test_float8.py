"""float8 files: scales are multiplied in where the convention is known, and refused elsewhere."""

import json

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from deradiff.anchors.anchor import load_anchor
from tests.support.anchor_files import (
    assert_acts_as,
    denoiser_of,
    layers_of,
    merged,
    refused,
    with_scales,
)
from tests.support.tiny_pipelines import perturbed_denoiser, tiny_lora

CPU = torch.device("cpu")
LARGEST = 448
"""Of float8_e4m3fn."""


def by_tensor(weight):
    """One scale, as ComfyUI has it."""
    return (weight.abs().max() / LARGEST).float().reshape(1)


def by_row(weight):
    """A scale for each row, as Black Forest Labs' fp8r has it."""
    return (weight.abs().amax(dim=1) / LARGEST).float()


def by_row_with_axes(weight):
    return by_row(weight)[:, None]


def quantised(state, ending, scale_of, dtype=torch.float8_e4m3fn):
    """The linear layers' weights in float8 with their scales, and the same network in float32."""
    file = {}
    exact = {}
    for key, value in state.items():
        layer, _, part = key.rpartition(".")
        if part != "weight" or value.ndim != 2:
            file[key] = exact[key] = value
            continue
        scale = scale_of(value)
        column = scale.reshape(-1, 1)
        file[key] = (value / column).to(dtype)
        file[layer + ending] = scale
        exact[key] = file[key].float() * column
    return file, exact


def perturbed():
    """The tensors of an SD1.5 network, and the network."""
    network = perturbed_denoiser(denoiser_of("sd15"))
    return {key: value.contiguous() for key, value in network.state_dict().items()}, network


def loaded(file):
    """The weights of an anchor's network, and the network in bfloat16."""
    anchor = load_anchor(file)
    network = anchor.network(denoiser_of("sd15"), CPU, torch.float32)
    return network.state_dict()


SCALED = {
    "comfy": (".scale_weight", by_tensor),
    "comfy of 2025": (".weight_scale", by_tensor),
    "a scale a row": (".weight_scale", by_row),
    "a scale a row, with axes": (".scale_weight", by_row_with_axes),
}


@pytest.mark.parametrize(("ending", "scale_of"), SCALED.values(), ids=SCALED.keys())
def test_scales_are_multiplied_in(tmp_path, ending, scale_of):
    state, network = perturbed()
    file, exact = quantised(state, ending, scale_of)
    save_file(file, tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded(tmp_path / "model.safetensors"), exact, rtol=0, atol=0)
    network.load_state_dict(exact)
    assert_acts_as("sd15", tmp_path, network, atol=1e-6)


def test_what_comfyui_writes_beside_the_scales_is_no_weight(tmp_path):
    state, _ = perturbed()
    file, exact = quantised(state, ".weight_scale", by_tensor)
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for key in [key for key in file if key.endswith(".weight_scale")]:
        layer = key.removesuffix(".weight_scale")
        file[f"{layer}.input_scale"] = torch.ones(())
        file[f"{layer}.comfy_quant"] = note.clone()
    file["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    save_file(file, tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded(tmp_path / "model.safetensors"), exact, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_without_scales_is_what_stands_there(tmp_path, dtype):
    """As diffusers' layerwise casting saves it: in one file, and in a folder."""
    state, network = perturbed()
    file = {key: v.to(dtype) if v.ndim == 2 else v for key, v in state.items()}
    exact = {key: value.float() for key, value in file.items()}
    save_file(file, tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded(tmp_path / "model.safetensors"), exact, rtol=0, atol=0)
    network.save_pretrained(tmp_path / "folder" / "unet")
    save_file(file, tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(loaded(tmp_path / "folder"), exact, rtol=0, atol=0)


def test_half_precision_is_rounded_once(tmp_path):
    state, _ = perturbed()
    file, exact = quantised(state, ".scale_weight", by_tensor)
    save_file(file, tmp_path / "model.safetensors")
    anchor = load_anchor(tmp_path)
    network = anchor.network(denoiser_of("sd15"), CPU, torch.bfloat16)
    expected = {key: value.bfloat16() for key, value in exact.items()}
    torch.testing.assert_close(network.state_dict(), expected, rtol=0, atol=0)


BLOCKS = torch.ones(4, 2)
UNKNOWN = {
    "blocks": ({"x.scale_weight": BLOCKS}, r"scales of shape \(4, 2\)"),
    "columns": ({"x.scale_weight": torch.ones(1, 8)}, r"scales of shape \(1, 8\)"),
    "nvfp4": (
        {"x.weight": torch.ones(4, 4, dtype=torch.uint8), "x.weight_scale_2": torch.ones(1)},
        "quantised",
    ),
    "int8": ({"x.weight": torch.ones(4, 8, dtype=torch.int8)}, "quantised as int8"),
    "no weight": ({"y.weight_scale": torch.ones(1)}, "belongs to no float8 weight"),
    "inverse": ({"x.weight_scale_inv": torch.ones(1)}, "in a way that deradiff does not know"),
}


@pytest.mark.parametrize(("change", "message"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_other_kinds_of_quantisation_are_refused(tmp_path, change, message):
    file = {"x.weight": torch.ones(4, 8).to(torch.float8_e4m3fn)} | change
    save_file(file, tmp_path / "model.safetensors")
    refused("sd15", tmp_path, message)


@pytest.mark.parametrize(
    "note", [{"format": "int8_tensorwise"}, {"format": "float8_e4m3fn", "convrot": True}]
)
@pytest.mark.parametrize("where", ["tensor", "header"])
def test_a_format_that_comfyui_notes_is_heeded(tmp_path, note, where):
    file = {
        "x.weight": torch.ones(4, 8).to(torch.float8_e4m3fn),
        "x.weight_scale": torch.ones(1),
    }
    metadata = None
    if where == "tensor":
        text = json.dumps(note).encode()
        file["x.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    else:
        metadata = {"_quantization_metadata": json.dumps({"layers": {"x": note}})}
    save_file(file, tmp_path / "model.safetensors", metadata)
    refused("sd15", tmp_path, "is quantised as (int8_tensorwise|rotated weights) .x.")


@pytest.mark.parametrize("ending", [".scale_weight", None])
def test_a_lora_in_float8(tmp_path, ending):
    lora = tiny_lora(denoiser_of("sd15"), 4, 4)
    state = get_peft_model_state_dict(lora, adapter_name="default")
    named = {f"unet.{key}": value.contiguous() for key, value in state.items()}
    if ending:
        file, exact = quantised(named, ending, by_tensor)
    else:
        file = {key: value.to(torch.float8_e4m3fn) for key, value in named.items()}
        exact = {key: value.float() for key, value in file.items()}
    save_file(file, tmp_path / "x.safetensors")
    layers = {}
    for name in layers_of(lora):
        key = f"unet.{name}.lora"
        layers[name] = (exact[f"{key}_A.weight"], exact[f"{key}_B.weight"], 1.0)
    assert_acts_as("sd15", tmp_path, merged("sd15", with_scales(layers, dict.fromkeys(layers, 1))))
