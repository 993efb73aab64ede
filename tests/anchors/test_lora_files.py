"""One LoRA in every format that trainers write: each acts as the merged weights do, and what means
more than that is refused."""

import copy
import json

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from deradiff.anchors.anchor import AnchorCard, load_anchor, save_anchor
from deradiff.models.families import FAMILIES
from tests.support.anchor_files import (
    assert_acts_as,
    denoiser_of,
    layers_of,
    merged,
    predict,
    predict_anchor,
    predict_stock,
    refused,
    with_scales,
)
from tests.support.products import sparse_product
from tests.support.realign_world import BASES
from tests.support.tiny_pipelines import tiny_lora

LORA = "pytorch_lora_weights.safetensors"
PEFT = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


def card(family):
    """The card of a LoRA anchor."""
    return AnchorCard(base_model="x", family=family, method="lora", beta=1)


def peft_model(family, config):
    """peft's own model around the family's denoiser."""
    return get_peft_model(copy.deepcopy(denoiser_of(family)), config)


def save_with_peft(family, lora, folder):
    """Save a LoRA as `PeftModel.save_pretrained` does it."""
    model = peft_model(family, lora.peft_config["default"])
    state = {f"base_model.model.{key}": value for key, value in lora.state_dict().items()}
    model.load_state_dict(state)
    model.save_pretrained(folder)


@pytest.mark.parametrize(("family", "alpha"), sparse_product([*FAMILIES], [4, 16]))
def test_diffusers_with_metadata(tmp_path, family, alpha):
    lora = tiny_lora(denoiser_of(family), 4, alpha)
    save_anchor(tmp_path, lora, card(family))
    (tmp_path / "anchor.json").unlink()
    assert_acts_as(family, tmp_path, merged(family, layers_of(lora)))


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_diffusers_without_metadata_has_alpha_equal_to_each_layers_rank(tmp_path, family):
    lora = tiny_lora(denoiser_of(family), 4, 4, rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 2})
    state = get_peft_model_state_dict(lora, adapter_name="default")
    BASES[family].save_lora_weights(tmp_path, **{f"{FAMILIES[family].denoiser}_lora_layers": state})
    assert_acts_as(family, tmp_path, merged(family, layers_of(lora)))


def test_trl_saves_a_lora_beside_the_whole_pipeline(tmp_path):
    """DDPO and AlignProp call `save_lora_weights` with diffusers' old names, and then save the
    pipeline, whose UNet has its layers wrapped."""
    pipe = copy.deepcopy(BASES["sd15"])
    pipe.unet = tiny_lora(pipe.unet, 4, 4)
    state = get_peft_model_state_dict(pipe.unet, adapter_name="default")
    state = convert_state_dict_to_diffusers(state)
    assert any(key.endswith(".lora.down.weight") for key in state)
    pipe.save_lora_weights(tmp_path, unet_lora_layers=state)
    pipe.save_pretrained(tmp_path)
    anchor = load_anchor(tmp_path)
    assert (anchor.method, anchor.weights, anchor.card) == ("lora", LORA, None)
    assert_acts_as("sd15", anchor, merged("sd15", layers_of(pipe.unet)))


def test_the_first_lora_scripts_of_diffusers_named_no_network(tmp_path):
    lora = tiny_lora(denoiser_of("sd15"), 4, 4)
    state = {}
    for name, (a, b, _) in layers_of(lora).items():
        block, _, layer = name.removesuffix(".0").rpartition(".")
        state[f"{block}.processor.{layer}_lora.down.weight"] = a.detach()
        state[f"{block}.processor.{layer}_lora.up.weight"] = b.detach()
    save_file(state, tmp_path / LORA)
    assert_acts_as("sd15", tmp_path, merged("sd15", layers_of(lora)))


PEFT_OPTIONS = {
    "alpha": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_q": 2, "attn.*to_v": 8}, "alpha_pattern": {"to_k": 1}},
    "regular expression": {"target_modules": r".*attn.*\.to_(q|v)"},
}


@pytest.mark.parametrize(
    ("family", "options"), sparse_product(["sd15", "sd3", "flux"], [*PEFT_OPTIONS])
)
def test_peft_itself(tmp_path, family, options):
    """As Flow-GRPO saves it."""
    lora = tiny_lora(denoiser_of(family), 4, 16, **PEFT_OPTIONS[options])
    save_with_peft(family, lora, tmp_path)
    anchor = load_anchor(tmp_path)
    assert (anchor.method, anchor.weights) == ("lora", PEFT)
    assert_acts_as(family, anchor, merged(family, layers_of(lora)))
    assert_acts_as(family, tmp_path / PEFT, merged(family, layers_of(lora)))


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_dora_of_peft_and_of_diffusers(tmp_path, family):
    lora = tiny_lora(denoiser_of(family), 4, 16, use_dora=True)
    save_with_peft(family, lora, tmp_path / "peft")
    save_anchor(tmp_path / "ours", lora, card(family))
    without_norm = predict(BASES[family], merged(family, layers_of(lora)))
    assert (predict(BASES[family], lora) - without_norm).abs().max() > 1e-3, "the norm matters"
    for folder in ("peft", "ours"):
        assert_acts_as(family, tmp_path / folder, lora)
    names = load_file(tmp_path / "ours" / LORA)
    assert any(name.endswith("lora_magnitude_vector") for name in names)


def kohya(layers, alphas):
    """A LoRA in the names of kohya's scripts, with a scalar alpha for each layer, or None."""
    state = {}
    for name, (a, b, _) in layers.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        state[f"{key}.lora_down.weight"] = a.detach()
        state[f"{key}.lora_up.weight"] = b.detach()
        if alphas[name] is not None:
            state[f"{key}.alpha"] = torch.tensor(float(alphas[name]))
    return state


@pytest.mark.parametrize(
    ("family", "choice"), sparse_product(["sd15", "sdxl"], ["one", "each", "none"])
)
def test_kohya_with_the_alpha_of_each_layer(tmp_path, family, choice):
    layers = layers_of(tiny_lora(denoiser_of(family), 4, 4))
    alphas = {}
    scales = {}
    for i, name in enumerate(layers):
        alphas[name] = {"one": 16, "each": 1 + 7 * (i % 3), "none": None}[choice]
        scales[name] = (alphas[name] or 4) / 4
    save_file(kohya(layers, alphas), tmp_path / "style.safetensors")
    expected = merged(family, with_scales(layers, scales))
    assert_acts_as(family, tmp_path / "style.safetensors", expected)

    # diffusers itself loses alphas that differ.
    if choice != "each":
        stock = predict_stock(family, tmp_path, weight_name="style.safetensors")
        assert torch.equal(stock, predict_anchor(family, tmp_path))


def test_kohya_in_the_original_names_of_sdxl(tmp_path):
    original = {
        "mid_block.attentions.0": "middle_block.1",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
    }
    layers = {}
    renamed = {}
    for name, layer in layers_of(tiny_lora(denoiser_of("sdxl"), 4, 4)).items():
        for ours, theirs in original.items():
            if name.startswith(ours):
                layers[name] = layer
                renamed[name.replace(ours, theirs)] = layer
    save_file(kohya(renamed, dict.fromkeys(renamed, 8)), tmp_path / "x.safetensors")
    expected = merged("sdxl", with_scales(layers, dict.fromkeys(layers, 2.0)))
    assert_acts_as("sdxl", tmp_path, expected)


def test_kohya_of_flux_has_queries_keys_and_values_in_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 32, generator=generator) / 3
    b = torch.randn(96, 4, generator=generator) / 3
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {
        f"{key}.lora_down.weight": a,
        f"{key}.lora_up.weight": b,
        f"{key}.alpha": torch.tensor(8.0),
    }
    save_file(state, tmp_path / "x.safetensors")
    layers = {}
    for part, rows in zip("qkv", b.chunk(3)):
        layers[f"transformer_blocks.0.attn.to_{part}"] = (a, rows, 2.0)
    assert_acts_as("flux", tmp_path, merged("flux", layers))


def kohya_text_encoder(up):
    """A layer of kohya's on the text encoder."""
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    return {
        f"{key}.lora_down.weight": torch.ones(4, 32),
        f"{key}.lora_up.weight": up,
        f"{key}.alpha": torch.tensor(4.0),
    }


def test_a_part_on_the_text_encoder_is_refused_unless_it_does_nothing(tmp_path):
    layers = layers_of(tiny_lora(denoiser_of("sd15"), 4, 4))
    state = kohya(layers, dict.fromkeys(layers, 4))
    zero = tmp_path / "zero.safetensors"
    save_file(state | kohya_text_encoder(torch.zeros(32, 4)), zero)
    assert_acts_as("sd15", zero, merged("sd15", layers))
    small = tmp_path / "small.safetensors"
    save_file(state | kohya_text_encoder(torch.full((32, 4), 1e-3)), small)
    message = r"also changes the text encoder .*give a LoRA on the unet alone"
    refused("sd15", small, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"init_lora_weights": "pissa_niter_4"},
            "began as pissa_niter_4, which changes the base's own weights",
        ),
        ({"init_lora_weights": "olora"}, "began as olora"),
        ({"peft_type": "LOHA"}, "is a LOHA adapter of peft"),
        ({"modules_to_save": ["conv_in"]}, "changes more than its LoRA layers .modules_to_save"),
        ({"bias": "all"}, "changes more than its LoRA layers .bias"),
    ],
)
def test_a_config_that_means_more_than_a_lora_is_refused_before_weights_are_read(
    tmp_path, change, message
):
    peft_model("sd15", LoraConfig(target_modules=["to_q"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / PEFT_CONFIG).read_text())
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_anchor(tmp_path)


def test_such_a_beginning_is_seen_in_the_metadata_of_diffusers_too(tmp_path):
    lora = tiny_lora(denoiser_of("sd15"))
    lora.peft_config["default"].init_lora_weights = "pissa"
    save_anchor(tmp_path, lora, card("sd15"))
    refused("sd15", tmp_path, "began as pissa")


def test_a_lora_of_peft_without_its_config_is_refused(tmp_path):
    peft_model("sd15", LoraConfig(target_modules=["to_q"])).save_pretrained(tmp_path)
    (tmp_path / PEFT_CONFIG).unlink()
    message = r"whose scale stands in its adapter_config.json: put that file beside it"
    refused("sd15", tmp_path, message)


def test_a_dora_in_kohyas_names_is_refused(tmp_path):
    layers = layers_of(tiny_lora(denoiser_of("sd15"), 4, 4))
    state = kohya(layers, dict.fromkeys(layers, 4))
    layer = next(iter(state)).split(".")[0]
    state[f"{layer}.dora_scale"] = torch.ones(16, 1)
    save_file(state, tmp_path / "dora.safetensors")
    refused("sd15", tmp_path / "dora.safetensors", "is a DoRA in kohya's or LyCORIS' names")


def test_another_adapter_is_refused(tmp_path):
    network = peft_model("sd15", LoHaConfig(target_modules=["to_q"]))
    state = get_peft_model_state_dict(network)
    named = {f"lora_unet_{key}": value for key, value in state.items()}
    save_file(named, tmp_path / "loha.safetensors")
    message = "is no LoRA that diffusers can read for the sd15 pipeline"
    refused("sd15", tmp_path / "loha.safetensors", message)


def test_a_lora_with_a_whole_layer_beside_it_is_refused(tmp_path):
    state = {
        "unet.x.lora_A.weight": torch.ones(2, 2),
        "unet.x.norm.weight": torch.ones(2),
        "unet.lora": torch.ones(1),
    }
    save_file(state, tmp_path / LORA)
    refused("sd15", tmp_path / LORA, "holds unet.* which is no part of a LoRA")


@pytest.mark.parametrize(
    ("family", "other"), [("sd15", "sdxl"), ("sd3", "flux"), ("flux", "sd3"), ("sd15", "flux")]
)
def test_a_lora_of_another_family_is_refused_naming_both(tmp_path, family, other):
    save_anchor(tmp_path, tiny_lora(denoiser_of(other)), card(other))
    refused(family, tmp_path, f"is of family {other} and the pipeline of {family}")

    # Without a card only its layers tell.
    (tmp_path / "anchor.json").unlink()
    message = rf"the LoRA anchor .*does not (fit|bind to) the {family} pipeline"
    refused(family, tmp_path, message)


def test_kohyas_names_of_sd3_are_told_apart(tmp_path):
    key = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    state = {
        f"{key}.lora_down.weight": torch.ones(4, 32),
        f"{key}.lora_up.weight": torch.ones(96, 4),
    }
    save_file(state, tmp_path / "x.safetensors")
    message = r"does not bind to the sd3 pipeline's transformer .lora_unet_joint_blocks_0"
    refused("sd3", tmp_path, message)


def kohya_of_flux(key="lora_unet_double_blocks_0_img_attn_qkv", alpha=4.0):
    """One layer of kohya's LoRA for FLUX."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{key}.lora_down.weight": torch.randn(4, 32, generator=generator),
        f"{key}.lora_up.weight": torch.randn(96, 4, generator=generator),
        f"{key}.alpha": torch.tensor(alpha),
    }


def comfy_pair(key, up):
    """A layer in ComfyUI's names."""
    return {f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": up * torch.ones(8, 2)}


QKV = "lora_unet_double_blocks_0_img_attn_qkv"
T5 = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
CLIP = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
TEXT = "also changes the text encoder"
NO_PART = "which is no part of a LoRA"
BESIDE_A_LORA = {
    "biases": ({f"{QKV}.diff_b": torch.ones(96)}, f"{QKV}.diff_b, {NO_PART}"),
    "norms": ({"diffusion_model.double_blocks.0.norm.diff": torch.ones(3)}, NO_PART),
    "T5": (comfy_pair(T5, 1), TEXT),
    "kohya's T5": (comfy_pair("lora_te3_encoder_block_0", 1), TEXT),
    "CLIP": (comfy_pair(CLIP, 1), TEXT),
    "position embedding": (comfy_pair("lora_unet_position_embedding", 1), NO_PART),
    "projection of the text": (comfy_pair("lora_unet_text_projection", 1), NO_PART),
}


@pytest.mark.parametrize(("beside", "message"), BESIDE_A_LORA.values(), ids=BESIDE_A_LORA.keys())
def test_what_diffusers_drops_of_kohyas_flux_is_refused_unless_it_does_nothing(
    tmp_path, beside, message
):
    save_file(kohya_of_flux() | beside, tmp_path / "x.safetensors")
    refused("flux", tmp_path, message)

    # With zeros in B, or in whole weights, nothing is lost.
    zeros = {}
    for key, value in beside.items():
        zeros[key] = value if "lora_A" in key else 0 * value
    save_file(kohya_of_flux() | zeros, tmp_path / "x.safetensors")
    layers = {}
    state = kohya_of_flux()
    for part, rows in zip("qkv", state[f"{QKV}.lora_up.weight"].chunk(3)):
        name = f"transformer_blocks.0.attn.to_{part}"
        layers[name] = (state[f"{QKV}.lora_down.weight"], rows, 1.0)
    assert_acts_as("flux", tmp_path, merged("flux", layers))


def test_several_parts_that_diffusers_drops_are_counted(tmp_path):
    beside = comfy_pair("lora_unet_position_embedding", 1)
    save_file(kohya_of_flux() | beside, tmp_path / "x.safetensors")
    refused("flux", tmp_path, r"lora_unet_position_embedding\S* and 1 more, which is no part")


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_both_text_encoders_of_a_pipeline_are_seen(tmp_path, family):
    lora = tiny_lora(denoiser_of(family), 4, 4)
    state = get_peft_model_state_dict(lora, adapter_name="default")
    text = {"text_model.x.lora_A.weight": torch.ones(2, 4)}
    options = {f"{FAMILIES[family].denoiser}_lora_layers": state}
    for up, is_refused in ((0.0, False), (0.1, True)):
        text["text_model.x.lora_B.weight"] = torch.full((4, 2), up)
        for encoder in ("text_encoder", "text_encoder_2"):
            if family == "sd15" and encoder == "text_encoder_2":
                continue
            BASES[family].save_lora_weights(
                tmp_path, **options, **{f"{encoder}_lora_layers": dict(text)}
            )
            if is_refused:
                refused(family, tmp_path, f"{TEXT} .{encoder}")
            else:
                assert_acts_as(family, tmp_path, merged(family, layers_of(lora)))


def test_convolutions_of_1_by_1_are_linear_layers(tmp_path):
    """A LoRA that was trained where `proj_in` is a convolution, on a network where it is linear."""
    network = denoiser_of("sdxl")
    path = "down_blocks.1.attentions.0.proj_in"
    width = network.get_submodule(path).in_features
    a = torch.randn(4, width, generator=torch.Generator().manual_seed(0)) / 3
    b = torch.randn(width, 4, generator=torch.Generator().manual_seed(1)) / 3
    layers = {path: (a[:, :, None, None], b[:, :, None, None], 1.0)}
    save_file(kohya(layers, {path: 4}), tmp_path / "x.safetensors")
    assert_acts_as("sdxl", tmp_path, merged("sdxl", {path: (a, b, 1.0)}))

    layers = {path: (torch.ones(4, width, 3, 3), b[:, :, None, None], 1.0)}
    save_file(kohya(layers, {path: 4}), tmp_path / "x.safetensors")
    refused("sdxl", tmp_path, rf"its layer {path} has the shape .*3, 3., and .* is a Linear")


def test_linear_layers_are_convolutions_of_1_by_1(tmp_path):
    network = denoiser_of("sd15")
    path = "down_blocks.1.attentions.0.proj_in"
    width = network.get_submodule(path).in_channels
    a = torch.randn(4, width, generator=torch.Generator().manual_seed(0)) / 3
    b = torch.randn(width, 4, generator=torch.Generator().manual_seed(1)) / 3
    save_file(kohya({path: (a, b, 1.0)}, {path: 4}), tmp_path / "x.safetensors")
    assert_acts_as("sd15", tmp_path, merged("sd15", {path: (a, b, 1.0)}))


def test_the_adapters_name_in_a_state_dict_is_no_part_of_the_layers(tmp_path):
    """As scripts save it that do not ask peft for the state."""
    lora = tiny_lora(denoiser_of("sd3"), 4, 4)
    state = {}
    for key, value in lora.state_dict().items():
        if ".lora_" in key:
            state[f"transformer.{key}"] = value
    assert any(".default." in key for key in state)
    save_file(state, tmp_path / "x.safetensors")
    assert_acts_as("sd3", tmp_path, merged("sd3", layers_of(lora)))


def test_an_alpha_for_each_layer_beside_diffusers_names_counts(tmp_path):
    lora = tiny_lora(denoiser_of("sd3"), 4, 4)
    state = {}
    for key, value in get_peft_model_state_dict(lora, adapter_name="default").items():
        state[f"transformer.{key}"] = value
        state[f"transformer.{key.partition('.lora_')[0]}.alpha"] = torch.tensor(8.0)
    save_file(state, tmp_path / "x.safetensors")
    layers = layers_of(lora)
    expected = merged("sd3", with_scales(layers, dict.fromkeys(layers, 2.0)))
    assert_acts_as("sd3", tmp_path, expected)
