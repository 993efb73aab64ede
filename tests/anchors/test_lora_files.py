"""One LoRA in every format that trainers write: each acts as the merged weights do; what means more than that is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from deradiff.anchors.anchor import AnchorCard, load_anchor, save_anchor
from deradiff.models.families import FAMILIES, family_of
from deradiff.realignment.context import realign
from tests.support.realign_world import BASES
from tests.support.tiny_pipelines import tiny_lora

LORA = "pytorch_lora_weights.safetensors"


def denoiser_of(family):
    return getattr(BASES[family], FAMILIES[family].denoiser)


def said(pipe, denoiser):
    """What a denoiser answers to one question."""
    family = family_of(pipe)
    shape = family.latent_shape(pipe, 64)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditioning = family.encode_prompts(pipe, ["a cat"])
        return family.denoise(denoiser, x, torch.tensor([401.0]), conditioning, 64)


def factors(lora):
    """(A, B, scale) of each layer of a network with a peft adapter "default"."""
    layers = {name: module for name, module in lora.named_modules() if hasattr(module, "lora_A")}
    return {
        name: (m.lora_A["default"].weight, m.lora_B["default"].weight, m.scaling["default"])
        for name, m in layers.items()
    }


def merged(family, layers):
    """The base with W + s B A written into it by hand."""
    network = copy.deepcopy(denoiser_of(family))
    with torch.no_grad():
        for name, (a, b, scale) in layers.items():
            weight = network.get_submodule(name).weight
            weight += scale * (b.flatten(1) @ a.flatten(1)).view_as(weight)
    return network


def check(family, anchor, expected, atol=2e-5):
    """The anchor at lam = 1 answers as the expected network does, which is not what the reference answers."""
    pipe = copy.deepcopy(BASES[family])
    wanted, reference = said(pipe, expected), said(pipe, denoiser_of(family))
    assert (wanted - reference).abs().max() > 50 * atol
    with realign(pipe, anchor, lam=1):
        torch.testing.assert_close(
            said(pipe, getattr(pipe, FAMILIES[family].denoiser)), wanted, rtol=0, atol=atol
        )


def stock(family, folder, **options):
    pipe = copy.deepcopy(BASES[family])
    pipe.load_lora_weights(folder, **options)
    return getattr(pipe, FAMILIES[family].denoiser)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 16)])
def test_diffusers_with_metadata(tmp_path, family, rank, alpha):
    lora = tiny_lora(denoiser_of(family), rank, alpha)
    save_anchor(tmp_path, lora, AnchorCard(base_model="x", family=family, method="lora", beta=1))
    (tmp_path / "anchor.json").unlink()
    check(family, tmp_path, merged(family, factors(lora)))


@pytest.mark.parametrize("family", ["sd15", "sd3"], indirect=True)
def test_diffusers_without_metadata_has_alpha_equal_to_each_layers_rank(tmp_path, family):
    lora = tiny_lora(denoiser_of(family), 4, 4, rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 2})
    name = FAMILIES[family].denoiser
    BASES[family].save_lora_weights(
        tmp_path, **{f"{name}_lora_layers": get_peft_model_state_dict(lora, adapter_name="default")}
    )
    check(family, tmp_path, merged(family, factors(lora)))


def test_trl_saves_a_lora_beside_the_whole_pipeline(tmp_path):
    """DDPO and AlignProp: `save_lora_weights` in diffusers' old names, then the pipeline, whose UNet has its layers wrapped."""
    pipe = copy.deepcopy(BASES["sd15"])
    pipe.unet = tiny_lora(pipe.unet, 4, 4)
    state = convert_state_dict_to_diffusers(
        get_peft_model_state_dict(pipe.unet, adapter_name="default")
    )
    assert any(key.endswith(".lora.down.weight") for key in state)
    pipe.save_lora_weights(tmp_path, unet_lora_layers=state)
    pipe.save_pretrained(tmp_path)
    anchor = load_anchor(tmp_path)
    assert (anchor.method, anchor.weights, anchor.card) == ("lora", LORA, None)
    check("sd15", anchor, merged("sd15", factors(pipe.unet)))


def test_the_first_lora_scripts_of_diffusers_named_no_network(tmp_path):
    lora, state = tiny_lora(denoiser_of("sd15"), 4, 4), {}
    for name, (a, b, _) in factors(lora).items():
        where, _, layer = name.removesuffix(".0").rpartition(".")
        (
            state[f"{where}.processor.{layer}_lora.down.weight"],
            state[f"{where}.processor.{layer}_lora.up.weight"],
        ) = a, b
    save_file({key: value.detach() for key, value in state.items()}, tmp_path / LORA)
    check("sd15", tmp_path, merged("sd15", factors(lora)))


PEFT = {
    "alpha": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_q": 2, "attn.*to_v": 8}, "alpha_pattern": {"to_k": 1}},
    "regular expression": {"target_modules": r".*attn.*\.to_(q|v)"},
}


@pytest.mark.parametrize("options", PEFT.values(), ids=PEFT.keys())
@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"], indirect=True)
def test_peft_itself(tmp_path, family, options):
    """As Flow-GRPO saves it: `PeftModel.save_pretrained`."""
    lora = tiny_lora(denoiser_of(family), 4, 16, **options)
    model = get_peft_model(copy.deepcopy(denoiser_of(family)), lora.peft_config["default"])
    model.load_state_dict(
        {f"base_model.model.{key}": value for key, value in lora.state_dict().items()}
    )
    model.save_pretrained(tmp_path)
    anchor = load_anchor(tmp_path)
    assert (anchor.method, anchor.weights) == ("lora", "adapter_model.safetensors")
    check(family, anchor, merged(family, factors(lora)))
    check(family, tmp_path / "adapter_model.safetensors", merged(family, factors(lora)))


@pytest.mark.parametrize("family", ["sd15", "sd3"], indirect=True)
def test_dora_of_peft_and_of_diffusers(tmp_path, family):
    lora, name = tiny_lora(denoiser_of(family), 4, 16, use_dora=True), FAMILIES[family].denoiser
    model = get_peft_model(copy.deepcopy(denoiser_of(family)), lora.peft_config["default"])
    model.load_state_dict(
        {f"base_model.model.{key}": value for key, value in lora.state_dict().items()}
    )
    model.save_pretrained(tmp_path / "peft")
    save_anchor(
        tmp_path / "ours", lora, AnchorCard(base_model="x", family=family, method="lora", beta=1)
    )
    plain = said(BASES[family], merged(family, factors(lora)))
    assert (said(BASES[family], lora) - plain).abs().max() > 1e-3, "the norm matters"
    for folder in ("peft", "ours"):
        check(family, tmp_path / folder, lora)
    assert any(
        key.endswith("lora_magnitude_vector") for key in load_file(tmp_path / "ours" / LORA)
    ), f"it is there, below {name}"


def kohya(layers, alphas, text=None):
    """The names of kohya's scripts, a scalar alpha a layer."""
    state = {}
    for name, (a, b, _) in layers.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": a.detach(), f"{key}.lora_up.weight": b.detach()}
        if alphas[name] is not None:
            state[f"{key}.alpha"] = torch.tensor(float(alphas[name]))
    return state | (text or {})


@pytest.mark.parametrize("family", ["sd15", "sdxl"], indirect=True)
@pytest.mark.parametrize("choose", ["one", "each", "none"])
def test_kohya_with_the_alpha_of_each_layer(tmp_path, family, choose):
    layers = factors(tiny_lora(denoiser_of(family), 4, 4))
    alphas = {
        name: {"one": 16, "each": 1 + 7 * (i % 3), "none": None}[choose]
        for i, name in enumerate(layers)
    }
    save_file(kohya(layers, alphas), tmp_path / "style.safetensors")
    expected = merged(
        family, {name: (a, b, (alphas[name] or 4) / 4) for name, (a, b, _) in layers.items()}
    )
    check(family, tmp_path / "style.safetensors", expected)
    if choose != "each":  # which diffusers loses
        assert torch.equal(
            said(BASES[family], stock(family, tmp_path, weight_name="style.safetensors")),
            with_anchor(family, tmp_path),
        )


def with_anchor(family, anchor):
    pipe = copy.deepcopy(BASES[family])
    with realign(pipe, anchor, lam=1):
        return said(pipe, getattr(pipe, FAMILIES[family].denoiser))


def test_kohya_in_the_original_names_of_sdxl(tmp_path):
    layers = {
        name: f
        for name, f in factors(tiny_lora(denoiser_of("sdxl"), 4, 4)).items()
        if name.startswith(("mid", "down_blocks.1"))
    }
    original = {
        "mid_block.attentions.0": "middle_block.1",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
    }
    renamed = {
        next(name.replace(ours, theirs) for ours, theirs in original.items() if ours in name): f
        for name, f in layers.items()
    }
    save_file(kohya(renamed, dict.fromkeys(renamed, 8)), tmp_path / "x.safetensors")
    check(
        "sdxl", tmp_path, merged("sdxl", {name: (a, b, 2.0) for name, (a, b, _) in layers.items()})
    )


def test_kohya_of_flux_has_queries_keys_and_values_in_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 32, generator=generator) / 3, torch.randn(96, 4, generator=generator) / 3
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {
            f"{key}.lora_down.weight": a,
            f"{key}.lora_up.weight": b,
            f"{key}.alpha": torch.tensor(8.0),
        },
        tmp_path / "x.safetensors",
    )
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    check(
        "flux",
        tmp_path,
        merged("flux", {name: (a, part, 2.0) for name, part in zip(names, b.chunk(3))}),
    )


def text_part(up):
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    return {
        f"{key}.lora_down.weight": torch.ones(4, 32),
        f"{key}.lora_up.weight": up,
        f"{key}.alpha": torch.tensor(4.0),
    }


def test_a_part_on_the_text_encoder_is_refused_unless_it_does_nothing(tmp_path):
    layers = factors(tiny_lora(denoiser_of("sd15"), 4, 4))
    alphas = dict.fromkeys(layers, 4)
    save_file(kohya(layers, alphas, text_part(torch.zeros(32, 4))), tmp_path / "zero.safetensors")
    check("sd15", tmp_path / "zero.safetensors", merged("sd15", layers))
    save_file(
        kohya(layers, alphas, text_part(torch.full((32, 4), 1e-3))), tmp_path / "some.safetensors"
    )
    refused(
        "sd15",
        tmp_path / "some.safetensors",
        r"also changes the text encoder .*give a LoRA on the unet alone",
    )


def refused(family, anchor, said):
    with (
        pytest.raises(ValueError, match=said) as error,
        realign(copy.deepcopy(BASES[family]), anchor, 0.5),
    ):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
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
    tmp_path, change, said
):
    get_peft_model(
        copy.deepcopy(denoiser_of("sd15")), LoraConfig(target_modules=["to_q"])
    ).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=said):
        load_anchor(tmp_path)


def test_such_a_beginning_is_seen_in_the_metadata_of_diffusers_too(tmp_path):
    lora = tiny_lora(denoiser_of("sd15"))
    lora.peft_config["default"].init_lora_weights = "pissa"
    save_anchor(tmp_path, lora, AnchorCard(base_model="x", family="sd15", method="lora", beta=1))
    refused("sd15", tmp_path, "began as pissa")


def test_files_that_would_be_read_as_less_than_they_are_are_refused(tmp_path):
    get_peft_model(
        copy.deepcopy(denoiser_of("sd15")), LoraConfig(target_modules=["to_q"])
    ).save_pretrained(tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").unlink()
    refused(
        "sd15",
        tmp_path / "peft",
        r"whose scale stands in its adapter_config.json: put that file beside it",
    )
    layers = factors(tiny_lora(denoiser_of("sd15"), 4, 4))
    state = kohya(layers, dict.fromkeys(layers, 4))
    norm = {f"{next(iter(state)).split('.')[0]}.dora_scale": torch.ones(16, 1)}
    save_file(state | norm, tmp_path / "dora.safetensors")
    refused("sd15", tmp_path / "dora.safetensors", "is a DoRA in kohya's or LyCORIS' names")
    network = get_peft_model(
        copy.deepcopy(denoiser_of("sd15")), LoHaConfig(target_modules=["to_q"])
    )
    save_file(
        {f"lora_unet_{k}": v for k, v in get_peft_model_state_dict(network).items()},
        tmp_path / "loha.safetensors",
    )
    refused(
        "sd15",
        tmp_path / "loha.safetensors",
        "is no LoRA that diffusers can read for the sd15 pipeline",
    )
    save_file(
        {
            "unet.x.lora_A.weight": torch.ones(2, 2),
            "unet.x.norm.weight": torch.ones(2),
            "unet.lora": torch.ones(1),
        },
        tmp_path / LORA,
    )
    refused("sd15", tmp_path / LORA, "holds unet.* which is no part of a LoRA")


@pytest.mark.parametrize(
    ("family", "other"), [("sd15", "sdxl"), ("sd3", "flux"), ("flux", "sd3"), ("sd15", "flux")]
)
def test_a_lora_of_another_family_is_refused_naming_both(tmp_path, family, other):
    save_anchor(
        tmp_path,
        tiny_lora(denoiser_of(other)),
        AnchorCard(base_model="x", family=other, method="lora", beta=1),
    )
    refused(family, tmp_path, f"is of family {other} and the pipeline of {family}")
    (tmp_path / "anchor.json").unlink()
    name = FAMILIES[family].denoiser
    refused(
        family,
        tmp_path,
        rf"the LoRA anchor .*(does not (fit|bind to) the {family} pipeline|does not bind to .* denoiser is its {name})",
    )


def test_kohyas_names_of_sd3_are_told_apart(tmp_path):
    key = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    save_file(
        {f"{key}.lora_down.weight": torch.ones(4, 32), f"{key}.lora_up.weight": torch.ones(96, 4)},
        tmp_path / "x.safetensors",
    )
    refused(
        "sd3",
        tmp_path,
        r"does not bind to the sd3 pipeline's transformer .lora_unet_joint_blocks_0",
    )
