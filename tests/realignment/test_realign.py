"""The dial inside stock pipelines: its two ends are theirs bit for bit, the middle is the mixture,
and nothing is left behind."""

import copy

import pytest
import torch

from deradiff.anchors.anchor import load_anchor
from deradiff.realignment.context import realign
from tests.support.products import sparse_product
from tests.support.realign_world import (
    BASES,
    SCHEDULERS,
    assert_between,
    denoise,
    fingerprint,
    sample,
)

METHODS = pytest.mark.parametrize("method", ["full1", "lora1"])
SAMPLERS_AND_MODES = [*((sampler, "exact") for sampler in SCHEDULERS), ("ddim", "weights")]


@pytest.mark.parametrize(
    ("world", "method", "sampler_and_mode"),
    sparse_product(["sd15", "sdxl"], ["full1", "lora1"], SAMPLERS_AND_MODES, together=2),
    indirect=["world"],
)
def test_ends_are_the_stock_pipelines_bit_for_bit_and_the_middle_is_neither(
    world, method, sampler_and_mode
):
    sampler, mode = sampler_and_mode
    world.use_sampler(sampler)
    reference = sample(world.pipe)
    anchor = sample(world.stock(method))
    assert not torch.equal(reference, anchor)
    with realign(world.pipe, world.anchors[method], lam=0, mode=mode) as dial:
        assert torch.equal(sample(world.pipe), reference)
        dial.lam = 1
        assert torch.equal(sample(world.pipe), anchor)
        dial.lam = 0.5
        middle = sample(world.pipe)
    assert_between(middle, reference, anchor, low=0.2, high=0.9)
    assert torch.equal(sample(world.pipe), reference)


@pytest.mark.parametrize(
    ("sampler", "method"), [("ddim", "full1"), ("ddpm", "lora1"), ("euler", "full1")]
)
def test_the_batch_changes_an_image_by_rounding_at_most(world, sampler, method):
    world.use_sampler(sampler)
    with realign(world.pipe, world.anchors[method], lam=0.6):
        together = sample(world.pipe, (0, 1, 2))
        alone = torch.cat([sample(world.pipe, (seed,)) for seed in (0, 1, 2)])
    assert (together - alone).abs().max() <= 1e-5 * together.std()


@pytest.mark.parametrize("lam", [0.3, 1.7])
@METHODS
@pytest.mark.filterwarnings("ignore::deradiff.realignment.dial.BeyondAnchorWarning")
def test_the_output_is_the_weighted_sum_of_both(sd15, method, lam):
    reference = denoise(sd15.pipe.unet)
    anchor = denoise(sd15.stock(method).unet)
    with realign(sd15.pipe, sd15.anchors[method], lam):
        mixed = denoise(sd15.pipe.unet)
        as_object = sd15.pipe.unet(torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 5, 32))
    torch.testing.assert_close(mixed, torch.lerp(reference, anchor, lam), rtol=0, atol=1e-5)
    assert type(as_object).__name__ == "UNet2DConditionOutput"
    assert as_object.sample.shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    "names", [("full1", "full2"), ("lora1", "lora2"), ("lora1", "full2"), ("full1", "lora2")]
)
def test_several_anchors_each_shift_by_their_own_lam(sd15, names):
    reference = denoise(sd15.pipe.unet)
    first, second = (denoise(sd15.stock(name).unet) for name in names)
    before = fingerprint(sd15.pipe.unet)
    anchors = [sd15.anchors[name] for name in names]
    with realign(sd15.pipe, anchors, lam=[0.5, 0.2]) as dial:
        expected = reference + 0.5 * (first - reference) + 0.2 * (second - reference)
        torch.testing.assert_close(denoise(sd15.pipe.unet), expected, rtol=0, atol=1e-5)

        dial.lam = [0, 1]
        assert dial.lam == [0.0, 1.0]
        assert torch.equal(denoise(sd15.pipe.unet), second)

        needed = r"2 anchor\(s\) need as many values of lam, and there are 1"
        with pytest.raises(ValueError, match=needed):
            dial.lam = 0.5
    assert fingerprint(sd15.pipe.unet) == before


def test_weights_mode_interpolates_the_weights(sd15):
    first = sd15.stock("full1").unet.state_dict()
    second = sd15.stock("full2").unet.state_dict()
    expected = {}
    for name, p in sd15.pipe.unet.state_dict().items():
        expected[name] = p + 0.3 * (first[name] - p) + 0.25 * (second[name] - p)
    summed = copy.deepcopy(sd15.pipe.unet)
    summed.load_state_dict(expected)

    anchors = [sd15.anchors["full1"], sd15.anchors["full2"]]
    with realign(sd15.pipe, anchors, [0.3, 0.25], mode="weights") as dial:
        torch.testing.assert_close(denoise(sd15.pipe.unet), denoise(summed), rtol=0, atol=1e-5)
        dial.lam = [1, 0]
        assert torch.equal(denoise(sd15.pipe.unet), denoise(sd15.stock("full1").unet))


def test_weights_mode_of_a_lora_is_its_scale(sd15):
    stock = sd15.stock("lora1")
    stock.set_adapters(stock.get_active_adapters(), 0.3)
    with realign(sd15.pipe, sd15.anchors["lora1"], 0.3, mode="weights"):
        torch.testing.assert_close(denoise(sd15.pipe.unet), denoise(stock.unet), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["exact", "weights"])
@METHODS
def test_leaving_restores_the_network_also_by_an_exception(sd15, method, mode):
    before = fingerprint(sd15.pipe.unet)
    with pytest.raises(KeyError), realign(sd15.pipe, sd15.anchors[method], 0.5, mode):
        sample(sd15.pipe)
        raise KeyError
    assert fingerprint(sd15.pipe.unet) == before


def test_a_failed_entry_leaves_nothing_behind(sd15, worlds):
    before = fingerprint(sd15.pipe.unet)
    foreign = load_anchor(worlds["sdxl"].anchors["full1"])
    foreign.family = None
    foreign.card = None
    anchors = [sd15.anchors["lora1"], foreign]
    with pytest.raises(ValueError), realign(sd15.pipe, anchors, [0.5, 0.5]):
        pass
    assert fingerprint(sd15.pipe.unet) == before


def test_an_error_inside_the_network_leaves_the_weights_in_place(sd15):
    before = fingerprint(sd15.pipe.unet)
    for method in ("full1", "lora1"):
        with realign(sd15.pipe, sd15.anchors[method], 0.5, mode="weights"):
            with pytest.raises(RuntimeError):
                sd15.pipe.unet(torch.zeros(1, 3, 8, 8), 5, torch.zeros(1, 5, 32))
            layers = [m for m in sd15.pipe.unet.modules() if hasattr(m, "scaling")]
            assert all(layer.active_adapters == [] for layer in layers)
    assert fingerprint(sd15.pipe.unet) == before


def test_adapters_of_the_user_stay_and_act_in_both(sd15):
    sd15.pipe.load_lora_weights(sd15.anchors["lora2"], adapter_name="style")
    before = fingerprint(sd15.pipe.unet)
    styled = sample(sd15.pipe)
    stock = sd15.stock("lora2")
    stock.load_lora_weights(sd15.anchors["lora1"], adapter_name="anchor")
    stock.set_adapters(["default_0", "anchor"])
    with realign(sd15.pipe, sd15.anchors["lora1"], lam=0) as dial:
        assert torch.equal(sample(sd15.pipe), styled)
        dial.lam = 1
        assert torch.equal(sample(sd15.pipe), sample(stock))
    assert fingerprint(sd15.pipe.unet) == before
    assert torch.equal(sample(sd15.pipe), styled)

    # A full anchor has the user's LoRA, too: it is weights for the reference's own network.
    full = sd15.stock("full1")
    full.load_lora_weights(sd15.anchors["lora2"], adapter_name="style")
    with realign(sd15.pipe, sd15.anchors["full1"], lam=1):
        assert torch.equal(sample(sd15.pipe), sample(full))
    assert fingerprint(sd15.pipe.unet) == before

    # A LoRA that the user has disabled acts in neither.
    sd15.pipe.disable_lora()
    with realign(sd15.pipe, sd15.anchors["lora1"], lam=1):
        assert torch.equal(sample(sd15.pipe), sample(sd15.stock("lora1")))
    assert torch.equal(sample(sd15.pipe), sample(BASES["sd15"]))


def test_an_adapter_loaded_inside_survives(sd15):
    with realign(sd15.pipe, sd15.anchors["lora1"], lam=0.5):
        sd15.pipe.load_lora_weights(sd15.anchors["lora2"], adapter_name="style")
        sd15.pipe.set_adapters("style")
    assert list(sd15.pipe.unet.peft_config) == ["style"]
    assert torch.equal(sample(sd15.pipe), sample(sd15.stock("lora2")))


def test_the_second_network_is_no_part_of_the_first_and_follows_its_precision(sd15):
    names = list(sd15.pipe.unet.state_dict())
    with realign(sd15.pipe, sd15.anchors["full1"], lam=1) as dial:
        assert list(sd15.pipe.unet.state_dict()) == names
        sd15.pipe.to(torch.bfloat16)
        stock = sd15.stock("full1").to(torch.bfloat16)
        assert torch.equal(sample(sd15.pipe), sample(stock))
        dial.lam = 0.3
        mixed = denoise(sd15.pipe.unet)
        dial.lam = 0
        exact = 0.7 * denoise(sd15.pipe.unet).float() + 0.3 * denoise(stock.unet).float()
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, exact.bfloat16()), "rounded once, after the sum"


@pytest.mark.parametrize(
    ("lam", "path_kl", "evaluations"),
    [(0, False, 1), (0.5, False, 2), (1, False, 1), (1, True, 2), (0, True, 1)],
)
def test_a_network_without_weight_is_not_evaluated(sd15, lam, path_kl, evaluations):
    calls = []
    with realign(sd15.pipe, sd15.anchors["lora1"], lam, path_kl=path_kl):
        handle = sd15.pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
        denoise(sd15.pipe.unet)
        handle.remove()
    assert len(calls) == evaluations


def test_lam_can_change_from_a_step_callback(sd15):
    def turn(pipe, step, t, values):
        dial.lam = 1 if step >= 1 else 0
        return values

    with realign(sd15.pipe, sd15.anchors["full1"], lam=0) as dial:
        always = sample(sd15.pipe)
        turned = sample(sd15.pipe, callback_on_step_end=turn)
    assert not torch.equal(always, turned)
    assert not torch.equal(turned, sample(sd15.stock("full1")))
