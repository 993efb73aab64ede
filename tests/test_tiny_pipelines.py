"""The networks of the tests are well conditioned: what a processor rounds differently stays small.

A change of the initial noise is followed through a whole chain in double precision. Where it grew
by a factor of thousands, two processors would make different images of the same seed, and tests
that compare images would pass on one machine and fail on the next.
"""

from __future__ import annotations

import functools

import pytest
import torch

from deradiff.models.families import FAMILIES
from tests.support.tiny_pipelines import (
    TINY,
    VISIBLE,
    perturbed_denoiser,
    tiny_lora,
    tiny_pipeline,
)

CHANGE = 1e-7
LARGEST_GROWTH = 10  # measured: 1.2 to 4
CHAOS = 1000


def noise(family, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, *TINY[family].latents), generator=generator, dtype=torch.float64)


@functools.cache
def sampled(family, network_of, change=0.0):
    """Latents after three steps in double precision, with the denoiser that `network_of` makes.

    change: how far the initial noise is moved.
    """
    latents = noise(family, 5) + change * noise(family, 6)
    pipe = tiny_pipeline(family)
    name = FAMILIES[family].denoiser
    pipe.register_modules(**{name: network_of(getattr(pipe, name))})
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.float64)
    options = {"height": 64, "width": 64, FAMILIES[family].guidance_argument: 3.0}
    options |= dict(FAMILIES[family].call_options)
    if FAMILIES[family].flow:
        options["max_sequence_length"] = 16
    with torch.no_grad():
        return pipe(
            prompt=["a red fox", "a blue bird"],
            num_inference_steps=3,
            output_type="latent",
            latents=latents,
            **options,
        ).images


def growth(family, network_of):
    """By how much a small change of the initial noise grows over the chain."""
    before = sampled(family, network_of)
    after = sampled(family, network_of, CHANGE)
    return float((after - before).norm() / (CHANGE * noise(family, 6)).norm())


NETWORKS = {
    "reference": lambda network: network,
    "full": lambda network: perturbed_denoiser(network, 0.5),
    "lora": lambda network: tiny_lora(network, scale=VISIBLE),
}


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_change_of_the_noise_stays_small(family, kind):
    assert growth(family, NETWORKS[kind]) < LARGEST_GROWTH


@pytest.mark.parametrize("family", TINY)
def test_a_visible_anchor_is_visible(family):
    reference = sampled(family, NETWORKS["reference"])
    for kind in ("full", "lora"):
        anchor = sampled(family, NETWORKS[kind])
        assert (anchor - reference).norm() > 0.05 * reference.norm()


def test_a_chaotic_network_would_be_seen():
    assert growth("sd15", lambda network: tiny_lora(network, scale=1.0)) > CHAOS
