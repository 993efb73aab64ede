"""Lambda over time, for each image and over a mask, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FluxPipeline

from deradiff.method.lambdas import broadcast_to, limit_lam, piecewise, ramp, validated, value_at


def test_a_ramp_is_linear_in_time():
    schedule = ramp(1.0, 0.2)
    assert [schedule(fraction) for fraction in (0, 0.5, 1)] == pytest.approx([1.0, 0.6, 0.2])


def test_each_step_of_a_piecewise_schedule_holds_until_the_next():
    schedule = piecewise([(0, 1.0), (0.5, 0.25), (0.75, 0.0)])
    fractions = (0, 0.49, 0.5, 0.74, 0.75, 1)
    assert [schedule(fraction) for fraction in fractions] == [1.0, 1.0, 0.25, 0.25, 0.0, 0.0]
    assert value_at(schedule, 0.6) == 0.25
    assert value_at(0.3, 0.6) == 0.3


@pytest.mark.parametrize(
    "points", [[], [(0.1, 1.0)], [(0, 1), (0.5, 0), (0.4, 1)], [(0, 1), (0, 2)], [(0, 1), (1.5, 0)]]
)
def test_points_out_of_order_are_refused(points):
    with pytest.raises(ValueError, match="rise from 0 to at most 1"):
        piecewise(points)


@pytest.mark.parametrize(
    "lam",
    [
        torch.tensor([0.5, torch.nan]),
        torch.tensor([math.nan]),
        torch.zeros(1, 4, 8, 8),
        torch.tensor([1, 2]),
        torch.tensor(torch.inf),
        "a",
    ],
)
def test_what_is_neither_a_strength_nor_a_schedule_is_refused(lam):
    with pytest.raises(ValueError, match="lam"):
        validated(lam)


def test_a_schedule_that_returns_no_strength_is_refused_when_it_does():
    with pytest.raises(ValueError, match="finite number"):
        value_at(lambda _: math.inf, 0.5)
    with pytest.raises(ValueError, match=r"at 0.5 of the time it returned"):
        value_at(lambda _: ramp(0, 1), 0.5)


def test_images_and_masks_become_rows_of_a_guided_batch():
    output = torch.zeros(4, 3, 2, 6)
    per_image = broadcast_to(torch.tensor([0.1, 0.7]), output, rows_per_image=2)
    assert per_image.shape == (4, 1, 1, 1)
    assert per_image.flatten().tolist() == pytest.approx([0.1, 0.7, 0.1, 0.7])
    mask = torch.rand(2, 6)
    assert torch.equal(broadcast_to(mask, output, 2), mask.expand(4, 1, 2, 6))
    masks = torch.rand(2, 2, 6)
    assert torch.equal(broadcast_to(masks, output, 2), torch.cat([masks, masks])[:, None])
    assert broadcast_to(0.5, output, 2) == 0.5


def test_a_mask_is_packed_as_flux_packs_latents():
    mask = torch.rand(2, 4, 6)
    latents = mask[:, None].expand(2, 16, 4, 6)
    packed = FluxPipeline._pack_latents(latents, 2, 16, 4, 6)
    assert torch.equal(broadcast_to(mask, torch.zeros(2, 6, 64), 1, patch_size=2), packed)


@pytest.mark.parametrize(
    ("lam", "shape", "rows_per_image", "message"),
    [
        (torch.rand(3), (4, 4, 8, 8), 2, "of 3 images and the pipeline samples 2"),
        (torch.rand(2), (4, 4, 8, 8), 1, "of 2 images and the pipeline samples 4"),
        (torch.rand(4, 4), (4, 4, 8, 8), 2, r"mask of \(4, 4\) over latents of \(8, 8\)"),
        (torch.rand(4, 4), (2, 6, 64), 1, "mask of 4 x 4 over latents of 24"),
    ],
)
def test_a_tensor_that_does_not_fit_the_latents_is_refused(lam, shape, rows_per_image, message):
    with pytest.raises(ValueError, match=message):
        broadcast_to(lam, torch.zeros(shape), rows_per_image, patch_size=2)


def test_the_trust_region_bounds_the_overshoot_alone():
    divergence = torch.tensor([0.5, 8.0, 0.0])
    limited = limit_lam(3.0, divergence, nats=2.0)
    # sqrt(2 / 0.5) = 2, sqrt(2 / 8) = 0.5, and no divergence to bound.
    assert limited.tolist() == pytest.approx([3.0, 1.5, 3.0])
    assert ((limited - 1) ** 2 * divergence <= 2.0 + 1e-6).all()

    # Up to the anchor there is no overshoot.
    assert limit_lam(0.7, divergence, 2.0).tolist() == pytest.approx([0.7] * 3)
    lams = torch.tensor([0.5, 3.0, 1.0])
    assert limit_lam(lams, divergence, 2.0).tolist() == pytest.approx([0.5, 1.5, 1.0])
