"""Whole networks from one file, in the layout of the models' authors: written by hand here, and
read by diffusers' converters."""

import copy
import re

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from deradiff.anchors.anchor import load_anchor
from deradiff.models.families import FAMILIES
from tests.support.anchor_files import assert_acts_as, denoiser_of, predict, refused
from tests.support.realign_world import BASES
from tests.support.tiny_pipelines import perturbed_denoiser, tiny_denoiser

CPU = torch.device("cpu")
PREFIX = "model.diffusion_model."

# Of a UNet of two levels with one layer each: the name in diffusers, and the authors' name.
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
SD3 = {
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    "context_embedder": "context_embedder",
}
SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_QKV = {
    "attn.to_q": "x_block.attn",
    "attn.add_q_proj": "context_block.attn",
    "attn2.to_q": "x_block.attn2",
}


def longest_start(names, key):
    """The longest of the names that a key begins with."""
    return max((name for name in names if key.startswith(name)), key=len)


def contiguous(state):
    """The tensors as safetensors takes them."""
    return {key: value.contiguous() for key, value in state.items()}


def ldm(network):
    """A UNet in the names of CompVis and Stability, as part of a checkpoint."""
    state = {}
    for key, value in network.state_dict().items():
        ours = longest_start([f"{name}." for name in UNET], key).removesuffix(".")
        rest = key.removeprefix(f"{ours}.")
        if "resnets" in ours:
            part = rest.split(".")[0]
            rest = rest.replace(part, RESNET[part], 1)
        state[f"{PREFIX}{UNET[ours]}.{rest}"] = value
    return state


def sd3(network):
    """An SD3 transformer in Stability's names, as part of a checkpoint.

    Queries, keys and values are one matrix there, and the last norms have the shift before the
    scale.
    """
    ours = network.state_dict()
    last_norm = f"transformer_blocks.{network.config.num_layers - 1}.norm1_context.linear"
    state = {}
    for key, value in ours.items():
        if key.startswith((last_norm, "norm_out.linear")):
            scale, shift = value.chunk(2)
            value = torch.cat([shift, scale])
        block = re.match(r"transformer_blocks\.(\d+)\.(.+?)(\.weight|\.bias)$", key)
        if block is None:
            name = longest_start(SD3, key)
            state[PREFIX + SD3[name] + key.removeprefix(name)] = value
            continue
        number, layer, kind = block.groups()
        if layer in SD3_BLOCK:
            state[f"{PREFIX}joint_blocks.{number}.{SD3_BLOCK[layer]}{kind}"] = value
        elif layer in SD3_QKV:
            parts = []
            for part in "qkv":
                name = key.replace(".to_q", f".to_{part}")
                parts.append(ours[name.replace("add_q_proj", f"add_{part}_proj")])
            state[f"{PREFIX}joint_blocks.{number}.{SD3_QKV[layer]}.qkv{kind}"] = torch.cat(parts)
    return state


WRITERS = {"sd15": ldm, "sdxl": ldm, "sd3": sd3}


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("whole", [True, False], ids=["checkpoint", "denoiser"])
def test_the_authors_layout(tmp_path, family, whole):
    trained = perturbed_denoiser(denoiser_of(family))
    state = contiguous(WRITERS[family](trained))
    if whole:
        # With the rest of a checkpoint, of which nothing is read.
        state["first_stage_model.encoder.conv_in.weight"] = torch.zeros(1)
        state["cond_stage_model.x"] = torch.zeros(1)
    else:
        state = {key.removeprefix(PREFIX): value for key, value in state.items()}
    save_file(state, tmp_path / "model.safetensors")

    anchor = load_anchor(tmp_path / "model.safetensors")
    assert (anchor.method, anchor.weights) == ("full", "model.safetensors")
    assert (anchor.family, anchor.card) == (family, None)
    network = anchor.network(denoiser_of(family), CPU, torch.float32)
    assert not network.training

    # The weights are the same bits. What they compute need not be: a matrix that was read from the
    # authors' shape may lie in memory in another order, and is then multiplied in another order.
    weights = network.state_dict()
    assert weights.keys() == trained.state_dict().keys()
    for name, value in trained.state_dict().items():
        assert torch.equal(weights[name], value)
    outputs = predict(BASES[family], network), predict(BASES[family], trained)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    assert anchor.network(denoiser_of(family), CPU, torch.bfloat16).dtype == torch.bfloat16
    assert_acts_as(family, tmp_path, trained, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_layout(tmp_path, family):
    trained = perturbed_denoiser(denoiser_of(family))
    save_file(contiguous(trained.state_dict()), tmp_path / "model.safetensors")
    assert_acts_as(family, tmp_path / "model.safetensors", trained, atol=1e-6)


def test_what_is_not_the_whole_network_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"

    # A part of the network.
    state = contiguous(ldm(denoiser_of("sd15")))
    save_file({key: value for key, value in state.items() if "out.2" not in key}, file)
    refused("sd15", file, "holds only a part of a UNet2DConditionModel")

    # A network of another size.
    save_file(ldm(tiny_denoiser("sd15", cross_attention_dim=24)), file)
    message = "is no LoRA, and does not hold a UNet2DConditionModel of the pipeline's size"
    refused("sd15", file, message)

    # A network of another family, and no network at all.
    save_file(contiguous(sd3(denoiser_of("sd3"))), file)
    refused("sd15", file, "is of family sd3 and the pipeline of sd15")
    save_file({"other": torch.zeros(1)}, file)
    refused("flux", file, "is no LoRA, and does not hold a FluxTransformer2DModel")
    file.write_text("hello")
    refused("flux", file, r"is no safetensors file that can be read")


def test_nothing_is_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.file_download._hf_hub_download_to_cache_dir",
        lambda *_, **__: pytest.fail("the hub was asked"),
    )
    trained = perturbed_denoiser(denoiser_of("sdxl"))
    save_file(ldm(trained), tmp_path / "model.safetensors")
    like = copy.deepcopy(denoiser_of("sdxl"))
    network = load_anchor(tmp_path).network(like, CPU, torch.float32)
    assert torch.equal(predict(BASES["sdxl"], network), predict(BASES["sdxl"], trained))
