"""What a run will need, against what a real training step of a tiny network holds in memory, and against sums by hand."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from deradiff.models.published import DATA_SETS, DENOISERS, GPUS, PUBLISHED_RUNS
from deradiff.models.requirements import cache_bytes, dpo_requirements
from tests.support.tiny_pipelines import tiny_denoiser

LORA = LoraConfig(r=4, target_modules=["to_q", "to_v"])


def needs(unet, **settings):
    return dpo_requirements(unet.config, 16, 16, 10, 8, 312, tokens=20, **settings)


def kept_by(unet) -> int:
    """Bytes that autograd keeps of a real forward, in float32, without the weights."""
    inputs = {"encoder_hidden_states": torch.zeros(1, 20, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type:
        pooled = (
            unet.config.projection_class_embeddings_input_dim
            - 6 * unet.config.addition_time_embed_dim
        )
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(1, pooled),
            "time_ids": torch.zeros(1, 6),
        }
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet.train()(torch.randn(1, 4, 16, 16), torch.zeros(1), **inputs)
    return sum(
        tensor.untyped_storage().nbytes()
        for address, tensor in kept.items()
        if address not in weights
    )


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_activations_are_those_that_autograd_keeps(family):
    unet = tiny_denoiser(family)
    assert needs(unet).activations == pytest.approx(
        kept_by(unet), rel=0.06
    )  # two images at half the bytes
    assert needs(unet, batch=3).activations == 3 * needs(unet).activations
    assert needs(unet, checkpointing=True).activations < 0.6 * needs(unet).activations


def test_the_attention_function_is_given_back():
    usual = torch.nn.functional.scaled_dot_product_attention
    needs(tiny_denoiser("sd15"))
    assert torch.nn.functional.scaled_dot_product_attention is usual


def test_weights_gradients_and_optimizer_of_a_full_finetune():
    unet = tiny_denoiser("sd15")
    count = sum(p.numel() for p in unet.parameters())
    full = needs(unet)
    assert (full.parameters, full.trained, full.weights, full.gradients) == (
        count,
        count,
        8 * count,
        4 * count,
    )
    assert (
        needs(unet, stored_reference=True).weights == 6 * count
        and needs(unet, stored_reference=True).flops == 0.75 * full.flops
    )
    real = torch.optim.AdamW(unet.parameters())
    for p in unet.parameters():
        p.grad = torch.zeros_like(p)
    real.step()
    held = sum(
        v.numel() * 4 for state in real.state.values() for k, v in state.items() if k != "step"
    )
    assert full.optimizer == held and needs(unet, optimizer="adamw8bit").optimizer == held / 4
    assert full.memory == full.weights + full.gradients + full.optimizer + full.activations
    with pytest.raises(ValueError, match="adamw, adafactor or adamw8bit"):
        needs(unet, optimizer="sgd")


def test_adafactor_holds_what_transformers_adafactor_holds():
    from transformers.optimization import Adafactor

    unet = tiny_denoiser("sd15")
    real = Adafactor(unet.parameters(), lr=1e-3, scale_parameter=False, relative_step=False)
    for p in unet.parameters():
        p.grad = torch.ones_like(p)
    real.step()
    held = sum(
        v.numel() * 4
        for state in real.state.values()
        for k, v in state.items()
        if isinstance(v, torch.Tensor) and k != "RMS"
    )
    assert needs(unet, optimizer="adafactor").optimizer == held


def test_a_lora_needs_one_network_and_its_own_gradients():
    unet = tiny_denoiser("sd15")
    count = sum(p.numel() for p in unet.parameters())
    lora = needs(unet, method="lora", lora=LORA)
    unet.add_adapter(LORA)
    trained = sum(p.numel() for n, p in unet.named_parameters() if "lora" in n)
    assert (lora.parameters, lora.trained, lora.gradients) == (count, trained, 4 * trained)
    assert lora.weights == 2 * count + 6 * trained
    assert lora.flops == 0.75 * needs(tiny_denoiser("sd15")).flops


def test_hours_are_flops_over_what_the_gpu_does():
    unet = tiny_denoiser("sd15")
    found = needs(unet, utilisation=0.5)
    assert (
        found.hours == pytest.approx(found.flops / (312e12 * 0.5 * 3600))
        and needs(unet, utilisation=0.25).hours == 2 * found.hours
    )


def test_the_cache_holds_latents_and_texts_in_half_precision():
    assert (
        cache_bytes(DENOISERS["sdxl"], 128, 128, images=2, captions=0) == 2 * 2 * 4 * 128 * 128
    )  # README: .26 MB a pair
    assert cache_bytes(DENOISERS["sdxl"], 128, 128, images=0, captions=1) == 2 * (77 * 2048 + 1280)
    assert cache_bytes(DENOISERS["sd15"], 64, 64, images=1, captions=1) == 2 * (
        4 * 64 * 64 + 77 * 768
    )


def test_every_published_recipe_has_what_it_is_counted_on():
    assert set(PUBLISHED_RUNS) == set(DENOISERS) and all(
        gpu.tflops > 100 and gpu.memory >= 24e9 for gpu in GPUS.values()
    )
    assert DATA_SETS["pickapic_v2"].rows > DATA_SETS["pickapic_v1"].rows
