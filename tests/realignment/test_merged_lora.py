"""LoRA anchors with weights of their own: the same images, at the cost of plain evaluations."""

from types import SimpleNamespace

import pytest
import torch

from deradiff.realignment import merged_lora
from deradiff.realignment.context import realign
from tests.support.realign_world import denoise, sample

ROUNDING = 1e-5
"""By so much outputs differ, in units of the latents: the sums are taken in another order."""


def lora_calls(pipe):
    """Count the calls of the LoRAs' own products in a pipeline's UNet."""
    calls = []
    for name, module in pipe.unet.named_modules():
        if ".lora_A." in name:
            module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_merged_lora_gives_the_same_images(world):
    anchor = world.anchors["lora1"]
    with realign(world.pipe, anchor, 0.6, memory="low") as dial:
        expected = sample(world.pipe)
        kl = dial.path_kl
    with realign(world.pipe, anchor, 0.6, memory="high") as dial:
        torch.testing.assert_close(sample(world.pipe), expected, atol=ROUNDING, rtol=0)
        torch.testing.assert_close(dial.path_kl, kl, rtol=1e-3, atol=0)
        assert dial.evaluations == 2
        dial.lam = 1
        assert torch.equal(sample(world.pipe), sample(world.stock("lora1")))
        dial.lam = 0
        reference = sample(world.pipe)
    assert torch.equal(sample(world.pipe), reference)


@pytest.mark.parametrize("mode", ["exact", "reuse", "sampled"])
def test_no_product_of_the_lora_is_left(sd15, mode):
    sd15.pipe.load_lora_weights(sd15.anchors["lora2"], adapter_name="style")
    calls = {}
    for memory in ("low", "high"):
        with realign(sd15.pipe, sd15.anchors["lora1"], 0.5, mode=mode, memory=memory):
            own_calls = lora_calls(sd15.pipe)
            sample(sd15.pipe)
            calls[memory] = len(own_calls)

    # The user's own LoRA runs in all evaluations, and the anchor's in none.
    evaluations = {"exact": 6, "reuse": 4, "sampled": 3}[mode]
    layers = sum(".lora_A." in name for name, _ in sd15.pipe.unet.named_modules())
    assert calls["high"] == evaluations * layers
    assert calls["low"] > calls["high"]


def test_several_loras_are_merged_apart(sd15):
    anchors = [sd15.anchors["lora1"], sd15.anchors["lora2"]]
    with realign(sd15.pipe, anchors, [0.5, 0.2]):
        expected = denoise(sd15.pipe.unet)
    with realign(sd15.pipe, anchors, [0.5, 0.2], memory="high"):
        torch.testing.assert_close(denoise(sd15.pipe.unet), expected, atol=ROUNDING, rtol=0)


def test_a_sweep_that_shares_its_start_still_ends_at_the_stock_anchor(sd15):
    with realign(sd15.pipe, sd15.anchors["lora1"], 0.5, memory="high", shared_start=True) as dial:
        calls = []
        handle = sd15.pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
        sample(sd15.pipe)
        dial.lam = 0.75
        sample(sd15.pipe)
        handle.remove()
        assert len(calls) == 2 * (3 + 2), "two of three steps were evaluated anew"
        dial.lam = torch.tensor([0.5, 1.0])
        mixed = sample(sd15.pipe)
        dial.lam = 1
        images = sample(sd15.pipe)
    assert torch.equal(images, sample(sd15.stock("lora1")))
    torch.testing.assert_close(mixed[1], images[1], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("options", [{"memory": "high"}, {"mode": "weights"}])
def test_the_scale_of_a_call_acts_on_the_anchor(sd15, options):
    """diffusers' `scale` multiplies all LoRAs on the network, and at 0 there are none."""
    for scale in (0.0, 0.5):
        call = {"cross_attention_kwargs": {"scale": scale}}
        with realign(sd15.pipe, sd15.anchors["lora1"], 1) as dial:
            stock = sample(sd15.pipe, **call)
            dial.lam = 0
            reference = sample(sd15.pipe, **call)
        with realign(sd15.pipe, sd15.anchors["lora1"], 0.999999, **options):
            images = sample(sd15.pipe, **call)
        torch.testing.assert_close(images, stock, atol=1e-4, rtol=0)
        is_reference = torch.allclose(images, reference, atol=1e-4, rtol=0)
        assert is_reference == (scale == 0)


def test_weights_that_change_between_two_calls_are_merged_anew(sd15):
    with realign(sd15.pipe, sd15.anchors["lora1"], 0.5, memory="high"):
        sample(sd15.pipe)
        with torch.no_grad():
            sd15.pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.mul_(2)
        changed = sample(sd15.pipe)
    with realign(sd15.pipe, sd15.anchors["lora1"], 0.5):
        torch.testing.assert_close(changed, sample(sd15.pipe), atol=ROUNDING, rtol=0)


def test_what_is_no_sum_of_weights_stays_beside_the_network(sd15, monkeypatch):
    with realign(sd15.pipe, sd15.anchors["lora1"], 0.5):
        expected = sample(sd15.pipe)
    monkeypatch.setattr("deradiff.realignment.adapters.Adapter.is_sum", False)
    with realign(sd15.pipe, sd15.anchors["lora1"], 0.5, memory="high"):
        assert torch.equal(sample(sd15.pipe), expected)


def half_precision_errors(world, dtype):
    """How far the mixture is from the reference, in half precision against single.

    Returns:
        The error of that difference by `memory`, in units of the difference.
    """
    anchor = world.anchors["lora1"]
    single = world.copy().pipe
    single.to(dtype).to(torch.float32)
    half = world.copy().pipe
    half.to(dtype)
    options = {"seeds": range(8), "num_inference_steps": 1, "guidance_scale": 1.0}

    def difference(pipe, memory):
        with realign(pipe, anchor, 0.5, memory=memory) as dial:
            mixture = sample(pipe, **options).float()
            dial.lam = 0
            return mixture - sample(pipe, **options).float()

    truth = difference(single, "low")
    errors = {}
    for memory in ("low", "high"):
        errors[memory] = (difference(half, memory) - truth).norm() / truth.norm()
    return errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_when_merged(worlds, dtype):
    """Merged weights are rounded once, beside what all activations are rounded."""
    errors = half_precision_errors(worlds["sd3"], dtype)
    assert errors["high"] < 1.1 * errors["low"]


class FakeNetwork:
    """A network of some bytes on some device."""

    def __init__(self, device, size):
        weight = SimpleNamespace(device=torch.device(device), nbytes=size, dtype=torch.float16)
        self.weight = weight

    def parameters(self):
        return iter([self.weight])


@pytest.mark.parametrize(
    ("device", "size", "fits"),
    [("cpu", 1, False), ("cuda", 6, True), ("cuda", 7, False)],
)
def test_auto_takes_half_of_a_gpu(monkeypatch, device, size, fits):
    """A card of 24 bytes, and a network of which one anchor changes every weight."""
    card = SimpleNamespace(total_memory=24)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    network = FakeNetwork(device, size)
    slots = {"layer.weight": SimpleNamespace(own=network.weight)}
    adapter = SimpleNamespace(layers=["layer"])
    assert merged_lora._fits(network, [adapter], slots) == fits


def test_another_word_is_refused(sd15):
    with (
        pytest.raises(ValueError, match="memory must be 'auto' or 'low' or 'high', not 'some'"),
        realign(sd15.pipe, sd15.anchors["lora1"], 0.5, memory="some"),
    ):
        pass
