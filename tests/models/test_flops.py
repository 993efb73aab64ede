"""FLOPs against the published configs' known figures, and against torch's own count of a training step."""

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
from deradiff.models.published import AUTOENCODER, DENOISERS, published_dpo
from tests.support.tiny_pipelines import tiny_denoiser

SD15, SDXL = DENOISERS["sd15"], DENOISERS["sdxl"]


def published(config):
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.mark.parametrize(
    ("config", "side", "tera", "giga"),
    [(SD15, 64, 0.80, 0.860), (SDXL, 128, 6.76, 2.567)],
    ids=["sd15", "sdxl"],
)
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
    unet = tiny_denoiser(family)
    added = {}
    if family == "sdxl":
        added = {
            "added_cond_kwargs": {"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(1, 6)}
        }
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(
            torch.zeros(1, 4, 16, 8),
            torch.zeros(1),
            torch.zeros(1, 20, unet.config.cross_attention_dim),
            **added,
        )
    real = counter.get_total_flops()
    assert denoiser_flops(unet.config, 16, 8, tokens=20) == pytest.approx(
        real, rel=0.2
    )  # fused attention counts a little otherwise
    assert denoiser_flops(unet.config, 16, 16, tokens=20) > 1.8 * denoiser_flops(
        unet.config, 16, 8, tokens=20
    )


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


@pytest.mark.parametrize("config", [SD3, FLUX], ids=["sd3", "flux"])
def test_a_flow_transformer_is_counted_on_its_own_inputs(config):
    """By hand: every linear layer, on as many rows as it sees; attention and what little is left may add a fifth."""
    rows, tokens, seen, counted = (8 * 8 // 4), 20, 0, denoiser_flops(config, 8, 8, tokens=20)
    network = meta_denoiser(config)

    def linear(module, inputs, output):
        nonlocal seen
        seen += 2 * inputs[0].shape[:-1].numel() * module.weight.numel()

    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(linear)
    network(**denoiser_inputs(network.config, 8, 8, tokens))
    assert seen < counted < 1.25 * seen
    assert (
        counted / rows < denoiser_flops(config, 16, 16, tokens=20) / rows
    )  # more pixels, more work


def test_the_published_autoencoder():
    assert encoder_flops(AUTOENCODER, 1024, 1024) / 1e12 == pytest.approx(4.88, abs=0.01)
    assert encoder_flops(AUTOENCODER, 512, 512) / 1e12 == pytest.approx(1.12, abs=0.01)


@pytest.mark.parametrize(
    ("method", "checkpointing"), [("full", False), ("full", True), ("lora", False), ("lora", True)]
)
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
        unet(
            torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768)
        ).sample.sum().backward()
    assert dpo_step_flops(forward, 1, method, checkpointing) / 2 == pytest.approx(
        counter.get_total_flops() + forward, rel=0.06
    )


def test_steps_scale_with_pairs_and_refuse_other_methods():
    assert dpo_step_flops(1.0, 16, "full") == 2 * 16 * 4
    assert dpo_step_flops(1.0, 16, "lora", checkpointing=True) == 2 * 16 * 4
    assert dpo_step_flops(1.0, 16, "full", stored_reference=True) == 2 * 16 * 3
    assert dpo_step_flops(1.0, 16, "full", encoder=0.5) == 2 * 16 * 4.5
    with pytest.raises(ValueError, match="lora or full"):
        dpo_step_flops(1.0, 1, "dora")


def test_the_papers_row_is_derived_from_its_recipe_and_says_by_how_much_it_differs():
    row = published_dpo()
    assert row.published_flops == pytest.approx(
        336 * 3600 * 0.5 * 312e12, rel=1e-3
    )  # their reckoning
    assert row.flops == pytest.approx(2000 * 2048 * 2 * 4 * 6.76e12, rel=1e-3)
    assert row.ratio == pytest.approx(row.flops / 188.7e18) == pytest.approx(1.174, abs=1e-3)
    assert row.with_everything == pytest.approx(2000 * 2048 * 2 * (5 * 6.76e12 + 4.88e12), rel=1e-3)
    for figure in (
        "+17%",
        "59% of the peak",
        "84% of the peak",
        "336 h",
        "221.6 EFLOP",
        "316.9 EFLOP",
    ):
        assert figure in row.why
    with pytest.raises(ValueError, match="sdxl alone, not for sd15"):
        published_dpo("sd15")


def test_hours_and_savings():
    assert gpu_hours(1800, 8) == 4
    five = savings(336, [336] * 5)
    assert (five.from_scratch, five.anchor, five.saved) == (2016, 336, 1680)
    assert five.percent == pytest.approx(100 * 5 / 6)
    assert savings(0.0, [0.0]).percent == 0
