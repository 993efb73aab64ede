"""FLOPs against the known figures of the published configs, and against torch's own counts."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from deradiff.models.families import FAMILIES
from deradiff.models.flops import (
    denoiser_flops,
    denoiser_inputs,
    dpo_step_flops,
    encoder_flops,
    gpu_hours,
    meta_denoiser,
    savings,
)
from deradiff.models.published import AUTOENCODER, DENOISERS
from tests.support.products import sparse_product
from tests.support.tiny_pipelines import WIDTH, tiny_denoiser

TOKENS = 20
SD15_FORWARD = 0.80327e12
SD15 = DENOISERS["sd15"]
SDXL = DENOISERS["sdxl"]
SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "out_channels": 4,
}
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 4, 8],
}


def published(config):
    """A published UNet without its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.mark.parametrize(
    ("config", "side", "tera", "giga"),
    [(SD15, 64, 0.80, 0.860), (SDXL, 128, 6.76, 2.567)],
    ids=["sd15", "sdxl"],
)
def test_one_forward_of_the_published_denoisers(config, side, tera, giga):
    unet = published(config)
    parameters = sum(p.numel() for p in unet.parameters())
    assert parameters / 1e9 == pytest.approx(giga, abs=0.001)
    assert denoiser_flops(unet.config, side, side) / 1e12 == pytest.approx(tera, abs=0.005)


def test_a_multiply_add_is_two():
    with FlopCounterMode(display=False) as counter:
        torch.zeros(3, 5) @ torch.zeros(5, 7)
    assert counter.get_total_flops() == 2 * 3 * 5 * 7


SIZES = {"text_embeds": torch.zeros(1, WIDTH), "time_ids": torch.zeros(1, 6)}


@pytest.mark.parametrize(("family", "sizes"), [("sd15", None), ("sdxl", SIZES)])
def test_the_count_is_that_of_a_real_forward(family, sizes):
    unet = tiny_denoiser(family)
    text = torch.zeros(1, TOKENS, unet.config.cross_attention_dim)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(torch.zeros(1, 4, 16, 8), torch.zeros(1), text, added_cond_kwargs=sizes)
    real = counter.get_total_flops()

    # Fused attention counts a little otherwise
    counted = denoiser_flops(unet.config, 16, 8, TOKENS)
    assert counted == pytest.approx(real, rel=0.2)
    assert denoiser_flops(unet.config, 16, 16, TOKENS) > 1.8 * counted


@pytest.mark.parametrize("config", [SD3, FLUX], ids=["sd3", "flux"])
def test_a_flow_transformer_is_counted_on_its_own_inputs(config):
    """By hand: every linear layer, on as many rows as it sees.

    Attention, and what little else there is, may add a quarter.
    """
    network = meta_denoiser(config)
    linear_flops = []

    def count(module, inputs, output):
        rows = inputs[0].shape[:-1].numel()
        linear_flops.append(2 * rows * module.weight.numel())

    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    network(**denoiser_inputs(network.config, 8, 8, TOKENS))

    counted = denoiser_flops(config, 8, 8, TOKENS)
    assert sum(linear_flops) < counted < 1.25 * sum(linear_flops)
    assert counted < denoiser_flops(config, 16, 16, TOKENS), "more pixels, more work"


def test_a_network_of_no_family_is_refused():
    with pytest.raises(ValueError, match="a UNet1DModel belongs to no family"):
        denoiser_inputs({"_class_name": "UNet1DModel"}, 8, 8)


def test_the_published_autoencoder():
    assert encoder_flops(AUTOENCODER, 1024, 1024) / 1e12 == pytest.approx(4.88, abs=0.01)
    assert encoder_flops(AUTOENCODER, 512, 512) / 1e12 == pytest.approx(1.12, abs=0.01)


@pytest.mark.parametrize(
    ("method", "checkpointing"), sparse_product(["full", "lora"], [False, True])
)
def test_a_step_costs_what_torch_counts_of_it(method, checkpointing):
    """Forward and backward of SD1.5 on the meta device, and the reference's forward."""
    unet = published(SD15)
    if method == "lora":
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=4, target_modules=list(FAMILIES["sd15"].lora_targets)))
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        latents = torch.zeros(1, 4, 64, 64)
        output = unet(latents, torch.zeros(1), torch.zeros(1, 77, 768))
        output.sample.sum().backward()

    an_image = dpo_step_flops(SD15_FORWARD, 1, method, checkpointing) / 2
    assert an_image == pytest.approx(counter.get_total_flops() + SD15_FORWARD, rel=0.06)


def test_steps_scale_with_pairs_and_refuse_other_methods():
    assert dpo_step_flops(1.0, 16, "full") == 2 * 16 * 4
    assert dpo_step_flops(1.0, 16, "lora", checkpointing=True) == 2 * 16 * 4
    assert dpo_step_flops(1.0, 16, "full", stored_reference=True) == 2 * 16 * 3
    assert dpo_step_flops(1.0, 16, "full", encoder=0.5) == 2 * 16 * 4.5
    with pytest.raises(ValueError, match="lora or full"):
        dpo_step_flops(1.0, 1, "dora")


def test_hours_and_savings():
    assert gpu_hours(1800, 8) == 4
    five = savings(336, [336] * 5)
    assert (five.from_scratch, five.anchor, five.saved) == (2016, 336, 1680)
    assert five.percent == pytest.approx(100 * 5 / 6)
    assert savings(0.0, [0.0]).percent == 0
