"""What a run needs: against what a tiny network holds, what a GPU measured, and sums by hand."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers.optimization import Adafactor

from deradiff.models.families import FAMILIES
from deradiff.models.published import DENOISERS
from deradiff.models.requirements import cache_bytes, dpo_requirements
from tests.support.tiny_pipelines import WIDTH, tiny_denoiser

LORA = LoraConfig(r=4, target_modules=["to_q", "to_v"])
TOKENS = 20
SIZES = {"text_embeds": torch.zeros(1, WIDTH), "time_ids": torch.zeros(1, 6)}


@pytest.fixture
def no_activations(monkeypatch):
    """Activations, which take long to count, are 0: for tests of all the rest."""
    monkeypatch.setattr("deradiff.models.requirements.backward_bytes", lambda *_: 0.0)


def requirements(unet, **settings):
    """Of ten steps of eight pairs, latents of 16 x 16."""
    return dpo_requirements(unet.config, 16, 16, 10, 8, tokens=TOKENS, **settings)


def size(parameters):
    return sum(parameter.numel() for parameter in parameters)


def kept_by(unet, sizes) -> int:
    """Bytes that autograd keeps of a real forward, in float32, without the weights."""
    text = torch.zeros(1, TOKENS, unet.config.cross_attention_dim)
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def take(tensor):
        return tensor

    unet.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, take):
        unet(torch.randn(1, 4, 16, 16), torch.zeros(1), text, added_cond_kwargs=sizes)
    count = 0
    for address, tensor in kept.items():
        if address not in weights:
            count += tensor.untyped_storage().nbytes()
    return count


def held_by(optimizer, without):
    """Bytes of an optimiser's state in float32, without an entry that is one number."""
    count = 0
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and name != without:
                count += 4 * value.numel()
    return count


@pytest.mark.parametrize(("family", "sizes"), [("sd15", None), ("sdxl", SIZES)])
def test_activations_hold_what_autograd_keeps(family, sizes):
    unet = tiny_denoiser(family)
    counted = requirements(unet, half=None).activations
    # A pair has two images. Beside what is kept there is what an operation makes on its way.
    kept = 2 * kept_by(unet, sizes)
    assert kept < counted < 1.15 * kept
    assert requirements(unet, half=None, batch=3).activations == pytest.approx(3 * counted)
    assert requirements(unet, half=None, checkpointing=True).activations < 0.6 * counted


def test_autocast_keeps_copies_of_trained_weights_and_norms_in_single_precision_on_a_gpu():
    unet = tiny_denoiser("sd15")
    on_gpu = requirements(unet)
    on_cpu = requirements(unet, on_cuda=False)
    assert on_cpu.activations < on_gpu.activations
    one, two = on_gpu.activations, requirements(unet, batch=2).activations
    layers = [m for m in unet.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    copies = sum(2 * size(layer.parameters()) for layer in layers)
    # What does not grow with the batch
    assert 2 * one - two == pytest.approx(copies, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stored", "measured"),
    [("lora", False, 11.3e9), ("full", False, 56.6e9), ("full", True, 51.4e9)],
)
def test_sdxl_needs_what_was_measured_on_a_gpu(method, stored, measured):
    """On an H200, four pairs of 1024 pixels in bfloat16, AdamW, gradients checkpointed."""
    found = dpo_requirements(
        DENOISERS["sdxl"],
        128,
        128,
        1,
        4,
        method=method,
        lora=LoraConfig(r=16, target_modules=list(FAMILIES["sdxl"].lora_targets)),
        batch=4,
        checkpointing=True,
        stored_reference=stored,
    )
    assert found.memory == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_needs_are_counted(family):
    """Also with checkpointed gradients, which go through its forward again."""
    config = {"_class_name": FAMILIES[family].denoiser_class, **tiny_denoiser(family).config}
    lora = LoraConfig(r=4, target_modules=list(FAMILIES[family].lora_targets))
    needs = dpo_requirements(
        config, 16, 16, 10, 8, tokens=TOKENS, method="lora", lora=lora, checkpointing=True
    )
    assert 0 < needs.trained < needs.parameters
    assert needs.activations > 0
    assert cache_bytes(config, 16, 16, images=1, captions=0, tokens=TOKENS) > 0


def test_the_attention_function_is_given_back():
    usual = torch.nn.functional.scaled_dot_product_attention
    requirements(tiny_denoiser("sd15"))
    assert torch.nn.functional.scaled_dot_product_attention is usual


def test_weights_and_gradients_of_a_full_finetune(no_activations):
    unet = tiny_denoiser("sd15")
    count = size(unet.parameters())
    full = requirements(unet, average=True)
    assert (full.parameters, full.trained) == (count, count)
    assert (full.weights, full.gradients, full.average) == (4 * count, 4 * count, 4 * count)
    assert full.held == full.weights + full.reference + full.optimizer + full.average
    assert full.memory == full.held + full.gradients + max(full.activations, full.update)
    assert full.checkpoint == 4 * 4 * count

    # The copy's norms stay in single precision.
    layers = [m for m in unet.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    in_half = sum(size(layer.parameters()) for layer in layers)
    assert full.reference == 4 * count - 2 * in_half
    stored = requirements(unet, stored_reference=True)
    assert stored.reference == 0
    assert stored.flops == 0.75 * full.flops


def test_adamw_holds_what_torch_holds(no_activations):
    unet = tiny_denoiser("sd15")
    real = torch.optim.AdamW(unet.parameters())
    for parameter in unet.parameters():
        parameter.grad = torch.zeros_like(parameter)
    real.step()
    held = held_by(real, without="step")
    assert requirements(unet).optimizer == held
    assert requirements(unet, optimizer="adamw8bit").optimizer == held / 4
    with pytest.raises(ValueError, match="adamw, adafactor or adamw8bit"):
        requirements(unet, optimizer="sgd")


def test_adafactor_holds_what_transformers_holds(no_activations):
    unet = tiny_denoiser("sd15")
    real = Adafactor(unet.parameters(), lr=1e-3, scale_parameter=False, relative_step=False)
    for parameter in unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    real.step()
    assert requirements(unet, optimizer="adafactor").optimizer == held_by(real, without="RMS")


def test_a_lora_needs_one_network_and_its_own_gradients(no_activations):
    unet = tiny_denoiser("sd15")
    count = size(unet.parameters())
    lora = requirements(unet, method="lora", lora=LORA)
    unet.add_adapter(LORA)
    trained = size(value for name, value in unet.named_parameters() if "lora" in name)
    assert (lora.parameters, lora.trained, lora.gradients) == (count, trained, 4 * trained)
    assert lora.weights == 2 * count + 4 * trained
    assert lora.reference == 0
    assert lora.flops == 0.75 * requirements(tiny_denoiser("sd15")).flops


def test_hours_are_flops_over_what_the_gpu_does(no_activations):
    needs = requirements(tiny_denoiser("sd15"))
    assert needs.hours(312, 0.5) == pytest.approx(needs.flops / (312e12 * 0.5 * 3600))


def test_the_cache_holds_latents_and_texts_in_half_precision():
    sd15 = DENOISERS["sd15"]
    sdxl = DENOISERS["sdxl"]
    # 0.26 MB a pair
    assert cache_bytes(sdxl, 128, 128, images=2, captions=0) == 2 * 2 * 4 * 128 * 128
    assert cache_bytes(sdxl, 128, 128, images=0, captions=1) == 2 * (77 * 2048 + 1280)
    both = 2 * (4 * 64 * 64 + 77 * 768)
    assert cache_bytes(sd15, 64, 64, images=1, captions=1) == both
