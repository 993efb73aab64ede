"""FLOPs against the published configs' known figures, and against torch's own count of a training step."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from tiny_pipelines import tiny_unet
from torch.utils.flop_counter import FlopCounterMode

from deradiff.compute import denoiser_flops, dpo_step_flops, gpu_hours, savings
from deradiff.families import FAMILIES

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def published(config):
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.mark.parametrize(("config", "side", "tera", "giga"), [(SD15, 64, 0.80, 0.860), (SDXL, 128, 6.76, 2.567)], ids=["sd15", "sdxl"])
def test_one_forward_of_the_published_denoisers(config, side, tera, giga):
    unet = published(config)
    assert sum(p.numel() for p in unet.parameters()) / 1e9 == pytest.approx(giga, abs=0.001)
    assert denoiser_flops(unet.config, side, side) / 1e12 == pytest.approx(tera, abs=0.005)


def test_a_multiply_add_is_two():
    with FlopCounterMode(display=False) as counter:
        torch.zeros(3, 5) @ torch.zeros(5, 7)
    assert counter.get_total_flops() == 2 * 3 * 5 * 7


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_count_is_that_of_a_real_forward(family):
    unet = tiny_unet(family)
    added = {}
    if family == "sdxl":
        added = {"added_cond_kwargs": {"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(1, 6)}}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(torch.zeros(1, 4, 16, 8), torch.zeros(1), torch.zeros(1, 20, unet.config.cross_attention_dim), **added)
    real = counter.get_total_flops()
    assert denoiser_flops(unet.config, 16, 8, tokens=20) == pytest.approx(real, rel=0.2)  # fused attention counts a little otherwise
    assert denoiser_flops(unet.config, 16, 16, tokens=20) > 1.8 * denoiser_flops(unet.config, 16, 8, tokens=20)


@pytest.mark.parametrize(("method", "checkpointing"), [("full", False), ("full", True), ("lora", False), ("lora", True)])
def test_a_step_costs_what_torch_counts_of_it(method, checkpointing):
    """Forward and backward of SD1.5 on the meta device; the reference's forward is the remaining 1."""
    unet, forward = published(SD15), 0.80327e12
    if method == "lora":
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=4, target_modules=list(FAMILIES["sd15"].lora_targets)))
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet(torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768)).sample.sum().backward()
    assert dpo_step_flops(forward, 1, method, checkpointing) / 2 == pytest.approx(counter.get_total_flops() + forward, rel=0.06)


def test_steps_scale_with_pairs_and_refuse_other_methods():
    assert dpo_step_flops(1.0, 16, "full") == 2 * 16 * 4
    assert dpo_step_flops(1.0, 16, "lora", checkpointing=True) == 2 * 16 * 4
    with pytest.raises(ValueError, match="lora or full"):
        dpo_step_flops(1.0, 1, "dora")


def test_an_sdxl_anchor_is_of_the_size_that_the_paper_states():
    """188.7 EFLOPs an anchor, by their reckoning from hours and half of the peak; counted: 2000 steps of 2048 pairs."""
    assert 2000 * dpo_step_flops(6.76e12, 2048, "full") / 1e18 == pytest.approx(188.7, rel=0.2)


def test_hours_and_savings():
    assert gpu_hours(1800, 8) == 4
    five = savings(336, [336] * 5)
    assert (five.from_scratch, five.anchor, five.saved) == (2016, 336, 1680)
    assert five.percent == pytest.approx(100 * 5 / 6)
    assert savings(0.0, [0.0]).percent == 0
