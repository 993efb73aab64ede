"""The dial in every family's pipelines of every kind: its ends bit for bit, batches, and nothing
left behind."""

import itertools

import pytest
import torch

from deradiff.realignment.context import realign
from tests.support.products import sparse_product
from tests.support.realign_world import assert_between, fingerprint, sample
from tests.support.tiny_pipelines import EVERY_KIND, KINDS

METHODS = ("full1", "lora1")
NOT_IN_DIFFUSERS = [("sd3", "controlnet_img2img")]


def cases():
    """(family, kind, method) of every pipeline that diffusers has."""
    for case in sparse_product(EVERY_KIND, [*KINDS], METHODS, together=2):
        family, kind, _ = case.values
        if (family, kind) in NOT_IN_DIFFUSERS:
            continue
        marks = [pytest.mark.slow] if "_" in kind else case.marks
        yield pytest.param(*case.values, marks=marks)


@pytest.mark.parametrize(("family", "kind", "method"), cases())
def test_the_ends_are_the_stock_pipelines_and_the_middle_is_neither(worlds, family, kind, method):
    world = worlds[family].copy(kind)
    reference = sample(world.pipe)
    anchor = sample(world.stock(method))
    # After a call: the first one of FLUX's pipelines leaves an empty registry of hooks behind.
    before = fingerprint(world.denoiser)
    assert (anchor - reference).norm() > 0.005 * reference.norm()
    with realign(world.pipe, world.anchors[method], lam=0) as dial:
        assert torch.equal(sample(world.pipe), reference)
        dial.lam = 1
        assert torch.equal(sample(world.pipe), anchor)
        dial.lam = 0.5
        middle = sample(world.pipe)
    assert_between(middle, reference, anchor, low=0.3, high=0.7)
    assert fingerprint(world.denoiser) == before
    assert torch.equal(sample(world.pipe), reference)


@pytest.mark.parametrize("family", EVERY_KIND)
def test_a_controlnet_and_an_image_are_heard(worlds, family):
    """So that the cases above are about pipelines that differ."""
    kinds = ("text2img", "img2img", "inpaint", "controlnet")
    images = [sample(worlds[family].copy(kind).pipe) for kind in kinds]
    for one, other in itertools.combinations(images, 2):
        assert not torch.equal(one, other)


@pytest.mark.parametrize(("family", "kind"), sparse_product(EVERY_KIND, ["text2img", "img2img"]))
def test_the_batch_changes_an_image_by_rounding_at_most(worlds, family, kind):
    world = worlds[family].copy(kind)
    method = "lora1" if kind == "img2img" else "full1"
    with realign(world.pipe, world.anchors[method], lam=0.6):
        together = sample(world.pipe, (0, 1, 2))
        alone = torch.cat([sample(world.pipe, (seed,)) for seed in (0, 1, 2)])
    assert (together - alone).abs().max() <= 1e-5 * together.std()


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_flow_anchors_rows_and_the_references_as_one_batch(worlds, family):
    world = worlds[family].copy()
    with realign(world.pipe, world.anchors["lora1"], lam=0.5):
        apart = sample(world.pipe)
    with realign(world.pipe, world.anchors["lora1"], lam=0.5, batched=True):
        together = sample(world.pipe)
    assert (together - apart).abs().max() <= 1e-5 * apart.std()


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_flow_follows_the_weighted_sum_of_velocities(worlds, family):
    """One Euler step is linear in the velocity: at 0.3 it ends between the ends of both models."""
    world = worlds[family].copy()
    reference = sample(world.pipe, num_inference_steps=1)
    anchor = sample(world.stock("full1"), num_inference_steps=1)
    with realign(world.pipe, world.anchors["full1"], lam=0.3):
        mixed = sample(world.pipe, num_inference_steps=1)
    torch.testing.assert_close(mixed, torch.lerp(reference, anchor, 0.3), rtol=0, atol=1e-5)


def test_flux_with_true_guidance_mixes_both_of_its_evaluations(worlds):
    """It asks its transformer twice a step: for the prompt, and for the negative one."""
    world = worlds["flux"].copy()
    guided = {
        "true_cfg_scale": 3.0,
        "negative_prompt": ["bad", "worse"],
        "num_inference_steps": 1,
    }
    reference = sample(world.pipe, **guided)
    anchor = sample(world.stock("lora1"), **guided)
    assert not torch.allclose(reference, sample(world.pipe, num_inference_steps=1), atol=1e-3)
    with realign(world.pipe, world.anchors["lora1"], lam=1) as dial:
        assert torch.equal(sample(world.pipe, **guided), anchor)
        dial.lam = 0.3
        mixed = sample(world.pipe, **guided)
    torch.testing.assert_close(mixed, torch.lerp(reference, anchor, 0.3), rtol=0, atol=1e-5)


def test_sd3_that_skips_layers_mixes_all_of_its_evaluations(worlds):
    world = worlds["sd3"].copy()
    skipping = {
        "skip_guidance_layers": [0],
        "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 1.0,
    }
    reference = sample(world.pipe, **skipping)
    anchor = sample(world.stock("lora1"), **skipping)
    assert not torch.allclose(reference, sample(world.pipe), atol=1e-3)
    with realign(world.pipe, world.anchors["lora1"], lam=1) as dial:
        assert torch.equal(sample(world.pipe, **skipping), anchor)
        dial.lam = 0.5
        middle = sample(world.pipe, **skipping)
    distance = (anchor - reference).norm()
    assert (middle - (reference + anchor) / 2).norm() < 0.1 * distance
