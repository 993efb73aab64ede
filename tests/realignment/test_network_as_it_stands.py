"""The anchor's network is the reference's module as it stands at the call, with other weights.

So whatever is put on the network after it was loaded acts on reference and anchor alike: at lam = 1
the pipeline is the stock one with the anchor's weights and the same change, bit for bit.
"""

import threading

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor2_0

from deradiff.realignment.context import realign
from tests.support.realign_world import fingerprint, sample
from tests.support.toy_pipeline import GUIDANCES, ToyPipeline

ANCHORS = ["full1", "lora1"]
every_anchor = pytest.mark.parametrize("anchor", ANCHORS)


def assert_dialled(pipe, stock, folder, change, **options):
    """Assert that the dial's ends are stock pipelines with a change, and its middle is neither."""
    for changed in (pipe, stock):
        change(changed)
    reference = sample(pipe, **options)
    anchored = sample(stock, **options)
    assert not torch.equal(reference, anchored)
    with realign(pipe, folder, 0) as dial:
        assert torch.equal(sample(pipe, **options), reference)
        dial.lam = 1
        assert torch.equal(sample(pipe, **options), anchored)
        dial.lam = 0.5
        middle = sample(pipe, **options)
    distance = (anchored - reference).norm()
    assert (middle - reference).norm() > 0.05 * distance
    assert (middle - anchored).norm() > 0.05 * distance
    assert torch.equal(sample(pipe, **options), reference)


@every_anchor
def test_freeu_acts_on_both(sd15, anchor):
    def change(pipe):
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)

    assert_dialled(sd15.pipe, sd15.stock(anchor), sd15.anchors[anchor], change)


def test_what_is_switched_on_inside_the_context_acts_on_both(sd15):
    stock = sd15.stock("full1")
    stock.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    anchored = sample(stock)
    with realign(sd15.pipe, sd15.anchors["full1"], 1):
        sd15.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
        assert torch.equal(sample(sd15.pipe), anchored)


def test_fused_projections_are_those_of_the_anchor(sd15):
    def change(pipe):
        pipe.fuse_qkv_projections()

    assert_dialled(sd15.pipe, sd15.stock("full1"), sd15.anchors["full1"], change)


def test_a_lora_on_fused_projections_is_refused(sd15):
    sd15.pipe.fuse_qkv_projections()
    with (
        pytest.raises(ValueError, match=r"call pipe\.unfuse_qkv_projections"),
        realign(sd15.pipe, sd15.anchors["lora1"], 0.5),
    ):
        pass


def float8_at_rest(pipe):
    pipe.unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def test_layers_stored_in_float8_are_so_in_a_full_anchor_too(sd15):
    assert_dialled(sd15.pipe, sd15.stock("full1"), sd15.anchors["full1"], float8_at_rest)


def test_a_lora_on_layers_stored_in_float8_keeps_its_precision(sd15):
    exact = sample(sd15.stock("lora1")) - sample(sd15.pipe)
    float8_at_rest(sd15.pipe)
    with realign(sd15.pipe, sd15.anchors["lora1"], 0) as dial:
        reference = sample(sd15.pipe)
        dial.lam = 1
        difference = sample(sd15.pipe) - reference
    assert (difference - exact).norm() < 0.5 * exact.norm()


CACHES = {
    "first block": FirstBlockCacheConfig(threshold=0.5),
    "taylorseer": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    ),
}


@pytest.mark.parametrize("cache", CACHES)
@every_anchor
def test_each_model_has_a_cache_of_its_own(worlds, anchor, cache):
    flux = worlds["flux"].copy()

    def change(pipe):
        pipe.transformer.enable_cache(CACHES[cache])

    options = {"num_inference_steps": 5}
    assert_dialled(flux.pipe, flux.stock(anchor), flux.anchors[anchor], change, **options)


@pytest.mark.parametrize("cache", CACHES)
def test_the_path_kl_of_mode_weights_leaves_the_cache_alone(worlds, cache):
    flux = worlds["flux"].copy()
    flux.pipe.transformer.enable_cache(CACHES[cache])
    options = {"num_inference_steps": 5}
    with realign(flux.pipe, flux.anchors["full1"], 0.5, mode="weights"):
        expected = sample(flux.pipe, **options)
    with realign(flux.pipe, flux.anchors["full1"], 0.5, mode="weights", path_kl=True) as dial:
        assert torch.equal(sample(flux.pipe, **options), expected)
        assert dial.path_kl.gt(0).all()


def test_a_cache_and_modes_that_leave_evaluations_out_are_refused(worlds):
    flux = worlds["flux"].copy()
    flux.pipe.transformer.enable_cache(CACHES["first block"])
    for mode in ("reuse", "sampled"):
        with (
            pytest.raises(ValueError, match="which a cache of diffusers on the network counts"),
            realign(flux.pipe, flux.anchors["full1"], 0.5, mode=mode),
        ):
            sample(flux.pipe)
    with (
        pytest.raises(ValueError, match="do not go together: switch off one of them"),
        realign(flux.pipe, flux.anchors["full1"], 0.5, shared_start=True),
    ):
        sample(flux.pipe)


def test_a_full_anchor_does_not_mix_with_copies_that_group_offloading_keeps(sd15, tmp_path):
    apply_group_offloading(
        sd15.pipe.unet,
        onload_device=torch.device("cpu"),
        offload_type="leaf_level",
        offload_to_disk_path=str(tmp_path),
    )
    with (
        pytest.raises(ValueError, match="group offloading keeps copies"),
        realign(sd15.pipe, sd15.anchors["full1"], 0.5),
    ):
        pass


@every_anchor
def test_group_offloading_without_copies_is_exact(sd15, anchor):
    def change(pipe):
        apply_group_offloading(
            pipe.unet, onload_device=torch.device("cpu"), offload_type="leaf_level"
        )

    assert_dialled(sd15.pipe, sd15.stock(anchor), sd15.anchors[anchor], change)


@pytest.mark.parametrize("steps", [28, 50])
def test_flux_in_bfloat16_loses_no_step(worlds, steps):
    flux = worlds["flux"].copy()
    flux.pipe.to(torch.bfloat16)
    seen = []

    def lam(fraction):
        seen.append(fraction)
        return 0.5

    options = {"num_inference_steps": steps, "guidance_scale": 1.0}
    with realign(flux.pipe, flux.anchors["full1"], lam) as dial:
        sample(flux.pipe, **options)
        assert dial.path_kl.isfinite().all()
        assert dial.path_kl.gt(0).all()
    assert len(set(seen)) == steps
    assert seen == sorted(seen)
    with realign(flux.pipe, flux.anchors["full1"], 0.5, mode="reuse", every=4) as dial:
        sample(flux.pipe, **options)
        assert dial.evaluations == pytest.approx(1 + -(-steps // 4) / steps)


def test_lists_that_a_network_empties_are_fresh_for_each_model(sd15):
    """As a T2I-Adapter's `down_intrablock_additional_residuals`, from which the UNet pops."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    channels = sd15.pipe.unet.config.block_out_channels
    generator = torch.Generator().manual_seed(2)
    residuals = [torch.randn(2, width, 1, 1, generator=generator) for width in channels]

    def ask(unet):
        with torch.no_grad():
            given = [residual.clone() for residual in residuals]
            return unet(x, 401, text, down_intrablock_additional_residuals=given)[0]

    reference = ask(sd15.pipe.unet)
    anchored = ask(sd15.stock("full1").unet)
    plain = sd15.pipe.unet(x, 401, text)[0]
    assert not torch.equal(reference, plain)
    with realign(sd15.pipe, sd15.anchors["full1"], 0.5):
        middle = ask(sd15.pipe.unet)
    torch.testing.assert_close(middle, 0.5 * (reference + anchored), rtol=0, atol=1e-5)


def test_networks_that_take_and_return_lists_are_mixed_row_by_row(sd15, tmp_path, monkeypatch):
    """As Z-Image's."""
    pipe = ToyPipeline(sd15.pipe.unet, sd15.pipe.scheduler)
    plain = pipe("one_batch")
    with realign(pipe, sd15.anchors["full1"], torch.tensor([0.25, 0.75])):
        expected = pipe("one_batch")

    own_forward = type(pipe.unet).forward

    def forward(self, x, t, text, return_dict=False):
        output = own_forward(self, torch.stack(x), t, text, return_dict=False)[0]
        return (list(output.unbind()),)

    def listed(network, x, t, text, empty):
        rows = [*x.unbind(), *x.unbind()]
        out = torch.stack(network(rows, t, torch.cat([empty, text]), return_dict=False)[0])
        unconditional, conditional = out.chunk(2)
        return unconditional + 3.0 * (conditional - unconditional)

    monkeypatch.setattr(type(pipe.unet), "forward", forward)
    monkeypatch.setitem(GUIDANCES, "listed", listed)
    assert torch.equal(pipe("listed"), plain)
    with realign(pipe, sd15.anchors["full1"], torch.tensor([0.25, 0.75])) as dial:
        torch.testing.assert_close(pipe("listed"), expected, rtol=0, atol=1e-5)
        assert dial.path_kl.gt(0).all()


def test_adapters_that_go_inside_the_context_are_answered_in_one_sentence(sd15):
    sd15.pipe.load_lora_weights(sd15.anchors["lora2"], adapter_name="style")
    before = fingerprint(sd15.pipe.unet)
    with realign(sd15.pipe, sd15.anchors["lora1"], 0.5):
        sample(sd15.pipe)
        sd15.pipe.unload_lora_weights()
        with pytest.raises(ValueError, match="was removed from the network while"):
            sample(sd15.pipe)
    assert "peft_config" not in vars(sd15.pipe.unet)
    assert before["adapters"] == ["style"]


def test_the_users_lora_may_be_deleted_inside(sd15):
    sd15.pipe.load_lora_weights(sd15.anchors["lora2"], adapter_name="style")
    with realign(sd15.pipe, sd15.anchors["lora1"], 0) as dial:
        sd15.pipe.delete_adapters("style")
        at_zero = sample(sd15.pipe)
        dial.lam = 1
        at_one = sample(sd15.pipe)
    torch.testing.assert_close(at_zero, sample(sd15.pipe), rtol=0, atol=1e-5)
    torch.testing.assert_close(at_one, sample(sd15.stock("lora1")), rtol=0, atol=1e-5)


def test_several_threads_have_a_pipeline_each(sd15, worlds):
    pipes = [worlds["sd15"].copy().pipe for _ in range(3)]
    lams = (0.2, 0.5, 0.8)
    alone = []
    for pipe, lam in zip(pipes, lams):
        with realign(pipe, sd15.anchors["full1"], lam) as dial:
            alone.append((sample(pipe), dial.path_kl))

    results = [None] * 3

    def work(number):
        anchor = sd15.anchors["full1"]
        with realign(pipes[number], anchor, lams[number]) as dial:
            results[number] = (sample(pipes[number]), dial.path_kl)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (image, path_kl), (expected, expected_kl) in zip(results, alone):
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(path_kl, expected_kl, rtol=1e-4, atol=0)


def test_a_full_anchor_on_quantised_weights_is_refused(sd15):
    layer = sd15.pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    weight = torch.zeros(layer.weight.shape, dtype=torch.int8)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    with (
        pytest.raises(ValueError, match=r"network is quantised .* give a LoRA anchor"),
        realign(sd15.pipe, sd15.anchors["full1"], 0.5),
    ):
        pass


def test_a_chain_that_ends_early_is_followed_and_the_next_one_begins_anew(worlds):
    """As SDXL's base does for its refiner."""
    sdxl = worlds["sdxl"].copy()
    options = {"num_inference_steps": 6}
    with realign(sdxl.pipe, sdxl.anchors["full1"], 0.5) as dial:
        sample(sdxl.pipe, **options)
        whole = dial.path_kl
        sample(sdxl.pipe, denoising_end=0.5, **options)
        half = dial.path_kl
        sample(sdxl.pipe, **options)
        again = dial.path_kl
    assert half.gt(0).all()
    assert (half < whole).all()
    torch.testing.assert_close(again, whole, rtol=1e-5, atol=0)


def test_each_image_of_a_prompt_has_its_own_lambda(sd15):
    options = {"num_images_per_prompt": 2}
    with realign(sd15.pipe, sd15.anchors["full1"], torch.tensor([0.0, 1.0, 0.3, 1.0])):
        images = sample(sd15.pipe, **options)
    reference = sample(sd15.pipe, **options)
    anchored = sample(sd15.stock("full1"), **options)
    torch.testing.assert_close(images[0], reference[0], rtol=0, atol=1e-4)
    for image in (1, 3):
        torch.testing.assert_close(images[image], anchored[image], rtol=0, atol=1e-4)
    assert not torch.allclose(images[2], reference[2], atol=1e-2)


@pytest.mark.parametrize("mode", ["exact", "reuse"])
def test_guidance_may_be_switched_off_in_the_middle(sd15, mode):
    def switch_off(pipe, step, t, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    options = {
        "num_inference_steps": 6,
        "callback_on_step_end": switch_off,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    anchored = sample(sd15.stock("full1"), **options)
    with realign(sd15.pipe, sd15.anchors["full1"], 1, mode=mode, every=2) as dial:
        assert torch.equal(sample(sd15.pipe, **options), anchored)
        dial.lam = 0.5
        assert sample(sd15.pipe, **options).isfinite().all()
        assert dial.path_kl.isfinite().all()


def test_projections_that_are_fused_inside_are_refused_for_a_lora(sd15):
    with realign(sd15.pipe, sd15.anchors["lora1"], 0.5):
        sd15.pipe.fuse_qkv_projections()
        with pytest.raises(ValueError, match=r"call pipe\.unfuse_qkv_projections"):
            sample(sd15.pipe)


@every_anchor
def test_a_lora_that_is_fused_inside_is_answered_in_one_sentence(sd15, anchor):
    sd15.pipe.load_lora_weights(sd15.anchors["lora2"], adapter_name="style")
    with realign(sd15.pipe, sd15.anchors[anchor], 0.5):
        sd15.pipe.fuse_lora(adapter_names=["style"])
        with pytest.raises(ValueError, match=r"call\s+pipe\.unfuse_lora\(\)"):
            sample(sd15.pipe)
        sd15.pipe.unfuse_lora()


class Controller:
    """What prompt-to-prompt's and LEDITS++' processors share: it keeps the maps that it is given.

    It is called, as theirs are.
    """

    def __init__(self):
        self.maps = []

    def __call__(self, attention_map):
        self.maps.append(attention_map)


class Controlled(AttnProcessor2_0):
    """An attention processor with a controller."""

    def __init__(self, controller):
        super().__init__()
        self.controller = controller

    def __call__(self, attention, hidden_states, *args, **kwargs):
        out = super().__call__(attention, hidden_states, *args, **kwargs)
        self.controller(out)
        return out * (1 + 0.01 * len(self.controller.maps))


@pytest.mark.parametrize("anchor", ANCHORS)
def test_processors_that_keep_something_serve_one_model_a_step(sd15, anchor):
    pipe = sd15.pipe
    stock = sd15.stock(anchor)
    controllers = []
    for unet in (pipe.unet, stock.unet):
        controllers.append(Controller())
        unet.set_attn_processor(Controlled(controllers[-1]))

    def sampled(changed, **options):
        for controller in controllers:
            controller.maps.clear()
        return sample(changed, **options)

    reference = sampled(pipe)
    aligned = sampled(stock)
    options = {"batched": True} if anchor == "lora1" else {}
    for own in ({}, {"shared_start": True}, {"mode": "reuse"}, options):
        with (
            realign(pipe, sd15.anchors[anchor], 0.5, **own),
            pytest.raises(ValueError, match=r"processor \(Controlled\) keeps .* mode='weights'"),
        ):
            sampled(pipe)
    with realign(pipe, sd15.anchors[anchor], 0) as dial:
        assert torch.equal(sampled(pipe), reference)
        dial.lam = 1
        assert torch.equal(sampled(pipe), aligned)
    with realign(pipe, sd15.anchors[anchor], 1e-5, mode="weights"):
        assert torch.allclose(sampled(pipe), reference, atol=1e-3)
