"""The dial in every family's pipelines of every kind: its ends bit for bit, batches, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from deradiff.models.families import FAMILIES
from deradiff.realignment.context import realign
from tests.support.realign_world import fingerprint, sample
from tests.support.tiny_pipelines import KINDS

METHODS = {  # both where the denoiser is asked in the plainest way, and either one elsewhere
    "text2img": ("full1", "lora1"),
    "img2img": ("lora1",),
    "inpaint": ("full1",),
    "controlnet": ("full1", "lora1"),
    "controlnet_img2img": ("full1",),
    "controlnet_inpaint": ("lora1",),
}
CASES = [
    pytest.param(
        family,
        kind,
        method,
        id=f"{family}-{kind}-{method}",
        marks=[pytest.mark.slow] if "_" in kind else [],
    )
    for family in FAMILIES
    for kind in KINDS
    for method in METHODS[kind]
    if (family, kind) != ("sd3", "controlnet_img2img")  # diffusers has none
]


@pytest.mark.parametrize(("family", "kind", "method"), CASES)
def test_the_ends_are_the_stock_pipelines_and_the_middle_is_neither(worlds, family, kind, method):
    world = worlds[family].copy(kind)
    reference, anchor = sample(world.pipe), sample(world.stock(method))
    before = fingerprint(
        world.denoiser
    )  # FLUX's pipelines leave an empty registry of hooks behind when they are first called
    distance = (anchor - reference).norm()
    assert distance > 0.005 * reference.norm()
    with realign(world.pipe, world.anchors[method], lam=0) as dial:
        assert torch.equal(sample(world.pipe), reference)
        dial.lam = 1
        assert torch.equal(sample(world.pipe), anchor)
        dial.lam = 0.5
        middle = sample(world.pipe)
    assert 0.3 * distance < (middle - reference).norm() < 0.7 * distance
    assert 0.3 * distance < (middle - anchor).norm() < 0.7 * distance
    assert fingerprint(world.denoiser) == before
    assert torch.equal(sample(world.pipe), reference)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_controlnet_and_a_picture_are_heard(worlds, family):
    """So that the cases above are about pipelines that differ."""
    images = {
        kind: sample(worlds[family].copy(kind).pipe)
        for kind in ("text2img", "img2img", "inpaint", "controlnet")
    }
    kinds = list(images)
    assert not any(
        torch.equal(images[a], images[b]) for i, a in enumerate(kinds) for b in kinds[:i]
    )


@pytest.mark.parametrize("kind", ["text2img", "img2img"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_changes_an_image_by_rounding_at_most(worlds, family, kind):
    world = worlds[family].copy(kind)
    with realign(world.pipe, world.anchors["lora1" if kind == "img2img" else "full1"], lam=0.6):
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
    """One Euler step from the same noise is linear in the velocity: x1(.3) is exactly between those of the two ends."""
    world = worlds[family].copy()
    ends = [sample(pipe, num_inference_steps=1) for pipe in (world.pipe, world.stock("full1"))]
    with realign(world.pipe, world.anchors["full1"], lam=0.3):
        mixed = sample(world.pipe, num_inference_steps=1)
    torch.testing.assert_close(mixed, torch.lerp(*ends, 0.3), rtol=0, atol=1e-5)


def test_flux_with_true_guidance_mixes_both_of_its_evaluations(worlds):
    """It asks its transformer twice a step: for the prompt, and for the negative one."""
    world, guided = (
        worlds["flux"].copy(),
        {"true_cfg_scale": 3.0, "negative_prompt": ["bad", "worse"], "num_inference_steps": 1},
    )
    ends = [sample(pipe, **guided) for pipe in (world.pipe, world.stock("lora1"))]
    assert not torch.allclose(ends[0], sample(world.pipe, num_inference_steps=1), atol=1e-3)
    with realign(world.pipe, world.anchors["lora1"], lam=1) as dial:
        assert torch.equal(sample(world.pipe, **guided), ends[1])
        dial.lam = 0.3
        torch.testing.assert_close(
            sample(world.pipe, **guided), torch.lerp(*ends, 0.3), rtol=0, atol=1e-5
        )


def test_sd3_that_skips_layers_mixes_all_of_its_evaluations(worlds):
    world = worlds["sd3"].copy()
    skipping = {
        "skip_guidance_layers": [0],
        "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 1.0,
    }
    reference, anchor = (sample(pipe, **skipping) for pipe in (world.pipe, world.stock("lora1")))
    assert not torch.allclose(reference, sample(world.pipe), atol=1e-3)
    with realign(world.pipe, world.anchors["lora1"], lam=1) as dial:
        assert torch.equal(sample(world.pipe, **skipping), anchor)
        dial.lam = 0.5
        middle = sample(world.pipe, **skipping)
    distance = (anchor - reference).norm()
    assert (middle - (reference + anchor) / 2).norm() < 0.1 * distance
