"""Anchors of pipelines that deradiff does not train: networks and LoRAs of all of diffusers."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from deradiff.anchors.anchor import check_anchor, check_anchor_family, load_anchor
from deradiff.models.families import family_of_config
from tests.support.many_pipelines import (
    PIPELINES,
    added_weights,
    bare_pipeline,
    weights_of_lora,
    with_random_lora,
)
from tests.support.tiny_pipelines import perturbed_denoiser

CPU = torch.device("cpu")
LORA = "pytorch_lora_weights.safetensors"


WITH_LORA_LOADER = [name for name in PIPELINES if name != "pixart"]


@pytest.fixture(params=PIPELINES)
def name(request):
    return request.param


def assert_adds(anchor, pipe, expected):
    """Assert what an anchor adds to the layers of a pipeline's denoiser."""
    torch.testing.assert_close(weights_of_lora(anchor.lora(pipe)), expected)


def save_with_peft(network, lora, folder):
    """Save a LoRA as `PeftModel.save_pretrained` does it."""
    model = get_peft_model(copy.deepcopy(network), lora.peft_config["default"])
    state = {f"base_model.model.{key}": value for key, value in lora.state_dict().items()}
    model.load_state_dict(state)
    model.save_pretrained(folder)


def comfy(lora, alpha=None):
    """A LoRA in the names of ComfyUI, with an alpha for each layer where one is given."""
    state = {}
    for key, value in get_peft_model_state_dict(lora, adapter_name="default").items():
        state[f"diffusion_model.{key}"] = value.contiguous()
        if alpha is not None:
            layer = key.partition(".lora_")[0]
            state[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(alpha))
    return state


def refused(folder, pipe, message):
    """Assert that a LoRA is refused in one sentence."""
    with pytest.raises(ValueError, match=message) as error:
        load_anchor(folder).lora(pipe)
    assert "\n" not in str(error.value)


def trained_family(network):
    """The name of the family of a network that deradiff also trains; None for the others."""
    family = family_of_config({"_class_name": type(network).__name__, **network.config})
    return family.name if family else None


def test_a_network_in_its_folder(tmp_path, name):
    pipe = bare_pipeline(name)
    trained = perturbed_denoiser(pipe.transformer)
    trained.save_pretrained(tmp_path / "transformer")
    for source in (tmp_path, tmp_path / "transformer"):
        anchor = check_anchor(source, pipe)
        assert (anchor.method, anchor.family) == ("full", trained_family(trained))
        assert anchor.network_class == PIPELINES[name][1]
        network = anchor.network(pipe.transformer, CPU, torch.float32)
        torch.testing.assert_close(network.state_dict(), trained.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.diffusion_model."])
def test_a_network_in_one_file(tmp_path, name, prefix):
    pipe = bare_pipeline(name)
    trained = perturbed_denoiser(pipe.transformer)
    state = {prefix + key: value.contiguous() for key, value in trained.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    anchor = check_anchor(tmp_path / "model.safetensors", pipe)
    network = anchor.network(pipe.transformer, CPU, torch.float32)
    assert not network.training
    torch.testing.assert_close(network.state_dict(), trained.state_dict(), rtol=0, atol=0)
    assert all(not buffer.is_meta for buffer in network.buffers())


def test_a_file_of_a_part_or_of_more_is_refused(tmp_path):
    pipe = bare_pipeline("sana")
    state = {key: value.contiguous() for key, value in pipe.transformer.state_dict().items()}
    file = tmp_path / "model.safetensors"
    save_file(state | {"gate.weight": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"gate.weight, which no layer of .* has: give an anchor"):
        load_anchor(file).network(pipe.transformer, CPU, torch.float32)
    save_file({key: state[key] for key in list(state)[1:]}, file)
    with pytest.raises(ValueError, match=r"does not hold a SanaTransformer2DModel|only a part"):
        load_anchor(file).network(pipe.transformer, CPU, torch.float32)


def test_a_folder_with_weights_that_no_layer_has_is_refused(tmp_path):
    pipe = bare_pipeline("qwen")
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    state = {key: value.contiguous() for key, value in pipe.transformer.state_dict().items()}
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(state | {"proj_out.weight_scale": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"proj_out.weight_scale, which no layer"):
        load_anchor(tmp_path).network(pipe.transformer, CPU, torch.float32)


def test_another_class_of_network_is_refused_before_weights_are_read(tmp_path):
    bare_pipeline("pixart").transformer.save_pretrained(tmp_path / "transformer")
    for file in (tmp_path / "transformer").glob("*.safetensors"):
        file.unlink()
    message = (
        r"is a PixArtTransformer2DModel and the Wan pipeline's transformer a "
        "WanTransformer3DModel: give an anchor of its architecture"
    )
    with pytest.raises(ValueError, match=message):
        check_anchor(tmp_path, bare_pipeline("wan"))
    with pytest.raises(ValueError, match="is a PixArtTransformer2DModel and the sd3 pipeline's"):
        check_anchor_family(tmp_path, "sd3")


def test_a_quantised_network_is_refused(tmp_path):
    network = bare_pipeline("sana").transformer
    network.register_to_config(quantization_config={"quant_method": "bitsandbytes"})
    network.save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match=r"is quantised .bitsandbytes., and mixing needs its own"):
        load_anchor(tmp_path)


def test_two_denoisers_are_anchors_of_two_parts(tmp_path):
    pipe = bare_pipeline("wan")
    for part, seed in (("transformer", 1), ("transformer_2", 2)):
        trained = perturbed_denoiser(pipe.transformer, seed=seed)
        trained.save_pretrained(tmp_path / part)
    anchor = load_anchor(tmp_path)
    assert anchor.parts == ("transformer", "transformer_2")
    second = anchor.part("transformer_2")
    network = second.network(pipe.transformer, CPU, torch.float32)
    torch.testing.assert_close(network.state_dict(), trained.state_dict())
    with pytest.raises(ValueError, match="has no prior/"):
        anchor.part("prior")


@pytest.mark.parametrize("name", WITH_LORA_LOADER, indirect=True)
def test_a_lora_of_diffusers_with_metadata(tmp_path, name):
    pipe = bare_pipeline(name)
    lora = with_random_lora(pipe.transformer)
    config = lora.peft_config["default"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    state = get_peft_model_state_dict(lora, adapter_name="default")
    type(pipe).save_lora_weights(
        tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=config
    )
    assert_adds(check_anchor(tmp_path, pipe), pipe, added_weights(lora))


@pytest.mark.parametrize("name", WITH_LORA_LOADER, indirect=True)
def test_a_lora_that_a_network_has_saved_alone_keeps_its_alpha(tmp_path, name):
    pipe = bare_pipeline(name)
    lora = with_random_lora(pipe.transformer)
    lora._hf_peft_config_loaded = True
    lora.save_lora_adapter(tmp_path, adapter_name="default")
    assert_adds(load_anchor(tmp_path), pipe, added_weights(lora))


def test_a_lora_of_peft(tmp_path, name):
    pipe = bare_pipeline(name)
    lora = with_random_lora(pipe.transformer, rank=4, alpha=8)
    save_with_peft(pipe.transformer, lora, tmp_path)
    assert_adds(check_anchor(tmp_path, pipe), pipe, added_weights(lora))

    # Under another name the config beside it counts as well. Without it the scale is unknown.
    renamed = tmp_path / "epoch-5.safetensors"
    (tmp_path / "adapter_model.safetensors").rename(renamed)
    assert_adds(load_anchor(renamed), pipe, added_weights(lora))
    (tmp_path / "adapter_config.json").unlink()
    refused(renamed, pipe, "whose scale stands in its adapter_config.json")


def test_a_lora_for_the_second_of_two_denoisers(tmp_path):
    pipe = bare_pipeline("wan", transformer_2=copy.deepcopy(bare_pipeline("wan").transformer))
    lora = with_random_lora(pipe.transformer)
    state = get_peft_model_state_dict(lora, adapter_name="default")
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=state)
    weights = load_anchor(tmp_path).lora(pipe, "transformer_2")
    expected = {layer: added / 4 for layer, added in added_weights(lora).items()}
    torch.testing.assert_close(weights_of_lora(weights, "transformer_2"), expected)


@pytest.mark.parametrize("name", ["qwen", "z-image", "flux2"], indirect=True)
def test_a_lora_of_comfyui_with_the_alpha_of_each_layer(tmp_path, name):
    pipe = bare_pipeline(name)
    lora = with_random_lora(pipe.transformer, alpha=16)
    state = comfy(lora, alpha=16)
    if name == "flux2":
        # diffusers does not rename these layers, and hands their alphas on.
        state = {key: value for key, value in state.items() if ".attn.to_" in key}
    save_file(state, tmp_path / "x.safetensors")
    got = weights_of_lora(load_anchor(tmp_path).lora(pipe))
    expected = added_weights(lora)
    assert got
    torch.testing.assert_close(got, {layer: expected[layer] for layer in got})


@pytest.mark.parametrize("name", ["qwen", "z-image", "flux2", "sana"], indirect=True)
def test_text_encoders_and_whole_weights_beside_a_lora_are_refused(tmp_path, name):
    pipe = bare_pipeline(name)
    state = comfy(with_random_lora(pipe.transformer))
    layer = next(iter(state)).partition(".lora_")[0]
    text = "text_encoders.t5xxl.transformer.encoder.block.0"
    up = {f"{text}.lora_B.weight": torch.ones(4, 2), f"{text}.lora_A.weight": torch.ones(2, 4)}
    save_file(state | up, tmp_path / "x.safetensors")
    refused(tmp_path, pipe, "also changes the text encoder .text_encoders.t5xxl")
    save_file(state | {f"{layer}.diff_b": torch.ones(4)}, tmp_path / "x.safetensors")
    refused(tmp_path, pipe, "diff_b|does not bind to the [Ss]ana pipeline's transformer")


def lora_of_wan():
    """A LoRA in the names of Wan's authors, as it is published: alphas, and one layer's bias."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"ffn.0": (24, 32), "ffn.2": (32, 24)}
    for attention in ("self_attn", "cross_attn"):
        for part in "qkvo":
            sizes[f"{attention}.{part}"] = (24, 24)
    state = {}
    for layer, (inputs, outputs) in sizes.items():
        key = f"diffusion_model.blocks.0.{layer}"
        state[f"{key}.lora_down.weight"] = torch.randn(4, inputs, generator=generator)
        state[f"{key}.lora_up.weight"] = torch.randn(outputs, 4, generator=generator)
        state[f"{key}.alpha"] = torch.tensor(8.0)
    state["diffusion_model.blocks.0.self_attn.q.diff_b"] = torch.ones(24)
    return state


def test_biases_that_diffusers_reads_are_no_less_than_all(tmp_path):
    """diffusers takes Wan's `diff_b` for biases of B. In peft all layers have them, or none has."""
    pipe = bare_pipeline("wan")
    state = lora_of_wan()
    save_file(state, tmp_path / "x.safetensors")
    weights = load_anchor(tmp_path).lora(pipe)
    biases = {key: v for key, v in weights.state.items() if key.endswith("lora_B.bias")}
    assert len(biases) == 10
    assert torch.equal(biases.pop("transformer.blocks.0.attn1.to_q.lora_B.bias"), torch.ones(24))
    assert not any(bias.any() for bias in biases.values())

    # W + 2 B A x + bias, in the network that stock diffusers makes of it.
    network = pipe.transformer
    network.load_lora_adapter(weights.state, prefix="transformer", metadata=weights.metadata)
    layer = network.blocks[0].attn1.to_q
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    key = "diffusion_model.blocks.0.self_attn.q"
    product = state[f"{key}.lora_up.weight"] @ state[f"{key}.lora_down.weight"]
    expected = layer.base_layer(x) + 2 * x @ product.T + 1
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("key", ["blocks.0.norm3.diff", "patch_embedding.diff"])
def test_whole_weights_that_diffusers_drops_of_wan_are_refused(tmp_path, key):
    pipe = bare_pipeline("wan")
    beside = {f"diffusion_model.{key}": torch.ones(24)}
    save_file(lora_of_wan() | beside, tmp_path / "x.safetensors")
    refused(tmp_path, pipe, f"holds diffusion_model.{key}, which is no part of a LoRA")
    beside = {f"diffusion_model.{key}": torch.zeros(24)}
    save_file(lora_of_wan() | beside, tmp_path / "x.safetensors")
    assert len(load_anchor(tmp_path).lora(pipe).state) == 30


def test_a_lora_of_another_pipeline_is_refused(tmp_path):
    other = bare_pipeline("qwen")
    state = get_peft_model_state_dict(with_random_lora(other.transformer), adapter_name="default")
    save_file({f"unet.{key}": value for key, value in state.items()}, tmp_path / LORA)
    refused(tmp_path, bare_pipeline("sana"), "does not bind to the [Ss]ana pipeline's transformer")


def test_a_pipeline_may_have_no_scheduler(tmp_path):
    pipe = bare_pipeline("sana")
    pipe.save_pretrained(tmp_path)
    assert load_anchor(tmp_path).prediction == "flow_prediction"
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    pipe.scheduler = None
    assert check_anchor(tmp_path, pipe).network_class == "SanaTransformer2DModel"
