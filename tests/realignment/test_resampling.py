"""Particles inside stock pipelines: their weights by hand, resampling that takes the memory of a
scheduler along, and what is refused.

Shapes: K particles an image; rows (images * K, 4, 8, 8).
"""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)

from deradiff.method.particles import log_weight
from deradiff.realignment.context import realign
from deradiff.realignment.resampling import GuidedParticlesWarning
from tests.support.realign_world import SCHEDULERS, fingerprint, sample

pytestmark = pytest.mark.filterwarnings(
    "ignore::deradiff.realignment.resampling.GuidedParticlesWarning"
)
K = 4
STEPS = 6
LOG_WEIGHT = "deradiff.realignment.resampling.log_weight"
RESAMPLE = "deradiff.method.particles.Particles.resample"
REWEIGH = "deradiff.method.particles.Particles.reweigh"


def call(pipe, seeds, **options):
    """Latents of K rows for each seed's prompt, without guidance."""
    generators = []
    for seed in seeds:
        for particle in range(K):
            generators.append(torch.Generator().manual_seed(10 * seed + particle))
    arguments = {
        "num_inference_steps": STEPS,
        "guidance_scale": 1.0,
        "output_type": "latent",
        "num_images_per_prompt": K,
        "generator": generators,
    }
    return pipe([f"prompt {seed}" for seed in seeds], **arguments | options).images


def corrected(world, lam=0.5, seeds=(0,), **options):
    """Latents of K particles for each seed, and the dial."""
    with realign(world.pipe, world.anchors["full1"], lam, particles=K) as dial:
        return call(world.pipe, seeds, **options), dial


def keep_latents(latents):
    """A step callback that collects the latents after each step."""

    def watch(_, step, t, values):
        latents.append(values["latents"])
        return values

    return watch


def never_resample(particles, last=False):
    return None


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_particles_are_resampled_and_an_image_does_not_depend_on_its_batch(world, sampler):
    world.use_sampler(sampler)
    together, dial = corrected(world, seeds=(0, 1, 2))
    assert together.shape[0] == 3 * K
    assert dial.ess.shape == (3,)
    assert (dial.ess >= 1).all()
    assert (dial.ess < K).all()
    again, _ = corrected(world, seeds=(0, 1, 2))
    assert torch.equal(together, again)
    alone, _ = corrected(world, seeds=(1,))
    torch.testing.assert_close(alone, together[K : 2 * K], atol=1e-4, rtol=0)
    with realign(world.pipe, world.anchors["full1"], 0.5):
        plain = sample(world.pipe, (0,), num_inference_steps=STEPS, guidance_scale=1.0)
    assert not torch.equal(plain[0], together[0])


def test_weights_are_those_of_the_chain(sd15, monkeypatch):
    """log w = -c lam (1-lam) |D|^2 at every step, from both networks on the chain's own latents."""
    weights = []
    latents = []
    monkeypatch.setattr(REWEIGH, lambda self, log_w: weights.append(log_w))
    monkeypatch.setattr(RESAMPLE, never_resample)
    start = torch.randn(K, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    corrected(sd15, lam=0.3, latents=start, callback_on_step_end=keep_latents(latents))

    pipe = sd15.pipe
    anchor = sd15.stock("full1").unet
    text, _ = pipe.encode_prompt(["prompt 0"], "cpu", K, False)
    times = pipe.scheduler.timesteps
    bars = pipe.scheduler.alphas_cumprod[times].double()
    log_snr = (bars / (1 - bars)).log()
    samples = [start, *latents]
    assert len(weights) == STEPS
    for i, t in enumerate(times):
        with torch.no_grad():
            difference = anchor(samples[i], t, text).sample - pipe.unet(samples[i], t, text).sample
        gain = log_snr[i + 1] - log_snr[i] if i + 1 < STEPS else 1.0
        expected = -0.5 * 0.3 * 0.7 * gain * difference.square().sum((1, 2, 3))
        torch.testing.assert_close(weights[i].float(), expected.float(), rtol=1e-3, atol=0)


def test_several_anchors_weigh_by_the_spread_of_their_shifts():
    d1, d2 = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    spread = 0.5 * d1.square() + 0.3 * d2.square() - (0.5 * d1 + 0.3 * d2).square()
    expected = -0.7 * spread.sum((1, 2, 3))
    torch.testing.assert_close(log_weight(0.7, [0.5, 0.3], [d1, d2]), expected)


def test_what_a_multistep_scheduler_remembers_is_resampled_too(sd15, monkeypatch):
    """All particles become the second one at a step: from there on the chain is that one's own."""
    sd15.pipe.scheduler = DPMSolverMultistepScheduler.from_config(sd15.pipe.scheduler.config)
    monkeypatch.setattr(RESAMPLE, never_resample)
    free, _ = corrected(sd15)

    calls = []

    def all_second(self, last=False):
        calls.append(1)
        return torch.tensor([1] * K) if len(calls) == 3 else None

    monkeypatch.setattr(RESAMPLE, all_second)
    moved, _ = corrected(sd15)
    torch.testing.assert_close(moved, torch.stack([free[1]] * K), atol=1e-4, rtol=0)


def test_without_weights_an_image_is_one_of_the_plain_pipelines(sd15, monkeypatch):
    def no_weight(factor, lams, differences):
        return torch.zeros(len(differences[0]))

    monkeypatch.setattr(LOG_WEIGHT, no_weight)
    images, dial = corrected(sd15, seeds=(0, 1))
    with realign(sd15.pipe, sd15.anchors["full1"], 0.5):
        plain = call(sd15.pipe, seeds=(0, 1))
    assert dial.ess.tolist() == [K, K]
    for image in range(2):
        rows = slice(K * image, K * image + K)
        assert sum(torch.equal(images[K * image], other) for other in plain[rows]) == 1
        assert torch.equal(images[rows].sort(0).values, plain[rows].sort(0).values)


def test_without_an_effect_there_is_nothing_to_weigh(sd15):
    for lam in (0, 1):
        images, dial = corrected(sd15, lam=lam)
        assert dial.ess.tolist() == [K]
        assert len(images) == K


def test_the_scheduler_gets_its_step_back_and_a_new_one_is_followed(sd15):
    before = fingerprint(sd15.pipe.unet)
    corrected(sd15)
    assert not hasattr(DDIMScheduler.step, "__wrapped__")
    assert fingerprint(sd15.pipe.unet) == before
    with realign(sd15.pipe, sd15.anchors["full1"], 0.5, particles=2):
        first = sd15.pipe.scheduler
        sample(sd15.pipe, (0,), num_images_per_prompt=2)
        sd15.use_sampler("euler")
        sample(sd15.pipe, (0,), num_images_per_prompt=2)
        assert not hasattr(type(first).step, "__wrapped__")
        assert hasattr(EulerAncestralDiscreteScheduler.step, "__wrapped__")
    assert not hasattr(EulerAncestralDiscreteScheduler.step, "__wrapped__")


def test_guidance_makes_weights_a_heuristic_which_is_warned_of_once(sd15):
    with pytest.warns(GuidedParticlesWarning, match="heuristic") as caught:
        corrected(sd15, guidance_scale=3.0)
    assert len([w for w in caught if w.category is GuidedParticlesWarning]) == 1


def test_a_batch_that_is_no_multiple_of_the_particles_is_refused(sd15):
    with (
        realign(sd15.pipe, sd15.anchors["full1"], 0.5, particles=3),
        pytest.raises(ValueError, match="give num_images_per_prompt=3"),
    ):
        sample(sd15.pipe, (0, 1))


@pytest.mark.filterwarnings("ignore::deradiff.realignment.dial.BeyondAnchorWarning")
def test_particles_are_weighed_by_the_lambda_that_the_trust_region_left(sd15, monkeypatch):
    lams_used = []

    def note_lam(factor, lams, differences):
        lams_used.append(lams[0])
        return torch.zeros(len(differences[0]))

    monkeypatch.setattr(LOG_WEIGHT, note_lam)
    with realign(sd15.pipe, sd15.anchors["full1"], 3.0, particles=2, trust_region=1e-6):
        sample(sd15.pipe, (0,), num_images_per_prompt=2, guidance_scale=1.0)
    assert lams_used
    assert all(1 <= float(lam.max()) < 1.1 for lam in lams_used)
