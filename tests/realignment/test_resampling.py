"""Particles inside stock pipelines: weights by hand, resampling that takes a scheduler's memory along, and what is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from deradiff.method.particles import log_weight
from deradiff.realignment.context import realign
from tests.support.realign_world import SCHEDULERS, fingerprint, sample

pytestmark = pytest.mark.filterwarnings("ignore:with classifier-free guidance")
K = 4


def corrected(world, method="full1", lam=0.5, seeds=(0,), strength=K, **options):
    """Images (one a seed) of K particles each, and the dial."""
    with realign(world.pipe, world.anchors[method], lam, particles=K) as dial:
        generators = [
            torch.Generator().manual_seed(10 * seed + i) for seed in seeds for i in range(K)
        ]
        settings = {
            "num_inference_steps": 6,
            "guidance_scale": 1.0,
            "output_type": "latent",
        } | options
        return world.pipe(
            [f"prompt {s}" for s in seeds],
            num_images_per_prompt=K,
            generator=generators,
            **settings,
        ).images, dial


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_particles_are_resampled_and_an_image_does_not_depend_on_its_batch(world, sampler):
    world.pipe.scheduler = SCHEDULERS[sampler].from_config(world.pipe.scheduler.config)
    together, dial = corrected(world, seeds=(0, 1, 2))
    assert (
        together.shape[0] == 3 * K
        and dial.ess.shape == (3,)
        and ((dial.ess >= 1) & (dial.ess < K)).all()
    )
    again, _ = corrected(world, seeds=(0, 1, 2))
    assert torch.equal(together, again)
    alone, _ = corrected(world, seeds=(1,))
    torch.testing.assert_close(alone, together[K : 2 * K], atol=1e-4, rtol=0)
    with realign(world.pipe, world.anchors["full1"], 0.5):
        plain = sample(world.pipe, (0,), num_inference_steps=6, guidance_scale=1.0)
    assert not torch.equal(plain[0], together[0])


def test_weights_are_those_of_the_chain(sd15, monkeypatch):
    """log w = -c lam (1-lam) |D|^2 of every step, from both networks' outputs on the chain's own latents."""
    told, seen = [], []
    monkeypatch.setattr(
        "deradiff.method.particles.Particles.reweigh", lambda self, log_w: told.append(log_w)
    )
    monkeypatch.setattr(
        "deradiff.method.particles.Particles.resample", lambda self, last=False: None
    )
    start = torch.randn(K, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def watch(_, step, t, values):
        seen.append(values["latents"])
        return values

    corrected(sd15, lam=0.3, latents=start, callback_on_step_end=watch)
    anchor, text = (
        sd15.stock("full1").unet,
        sd15.pipe.encode_prompt(["prompt 0"], "cpu", K, False)[0],
    )
    times = sd15.pipe.scheduler.timesteps
    bars = sd15.pipe.scheduler.alphas_cumprod[times].double()
    log_snr = (bars / (1 - bars)).log()
    assert len(told) == 6
    for i, t in enumerate(times):
        x = [start, *seen][i]
        with torch.no_grad():
            d = anchor(x, t, text).sample - sd15.pipe.unet(x, t, text).sample
        gain = log_snr[i + 1] - log_snr[i] if i < 5 else 1.0
        torch.testing.assert_close(
            told[i].float(),
            (-0.5 * 0.3 * 0.7 * gain * d.square().sum((1, 2, 3))).float(),
            rtol=1e-3,
            atol=0,
        )


def test_several_anchors_weigh_by_the_spread_of_their_pulls():
    d1, d2 = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    told = log_weight(0.7, [0.5, 0.3], [d1, d2])
    expected = -0.7 * (0.5 * d1.square() + 0.3 * d2.square() - (0.5 * d1 + 0.3 * d2).square()).sum(
        (1, 2, 3)
    )
    torch.testing.assert_close(told, expected)


def test_what_a_multistep_scheduler_remembers_is_resampled_too(sd15, monkeypatch):
    """All particles become the second one at a step: from there on, the chain is that particle's own."""
    sd15.pipe.scheduler = DPMSolverMultistepScheduler.from_config(sd15.pipe.scheduler.config)
    alone, calls = [], []

    def keep(_, step, t, values):
        alone.append(values["latents"])
        return values

    monkeypatch.setattr(
        "deradiff.method.particles.Particles.resample", lambda self, last=False: None
    )
    free, _ = corrected(sd15, callback_on_step_end=keep)

    def all_second(self, last=False):
        calls.append(1)
        return torch.tensor([1] * K) if len(calls) == 3 else None

    monkeypatch.setattr("deradiff.method.particles.Particles.resample", all_second)
    moved, _ = corrected(sd15)
    text_is_shared = torch.stack([free[1]] * K)
    torch.testing.assert_close(moved, text_is_shared, atol=1e-4, rtol=0)


def test_without_weights_an_image_is_one_of_the_plain_pipelines(sd15, monkeypatch):
    monkeypatch.setattr(
        "deradiff.realignment.resampling.log_weight",
        lambda factor, lams, differences: torch.zeros(len(differences[0])),
    )
    images, dial = corrected(sd15, seeds=(0, 1))
    with realign(sd15.pipe, sd15.anchors["full1"], 0.5):
        generators = [
            torch.Generator().manual_seed(10 * seed + i) for seed in (0, 1) for i in range(K)
        ]
        plain = sd15.pipe(
            ["prompt 0", "prompt 1"],
            num_images_per_prompt=K,
            generator=generators,
            num_inference_steps=6,
            guidance_scale=1.0,
            output_type="latent",
        ).images
    assert dial.ess.tolist() == [K, K]
    for image in range(2):
        rows = slice(K * image, K * image + K)
        assert sum(torch.equal(images[K * image], other) for other in plain[rows]) == 1
        assert torch.equal(images[rows].sort(0).values, plain[rows].sort(0).values)


def test_without_an_effect_there_is_nothing_to_weigh(sd15):
    for lam in (0, 1):
        images, dial = corrected(sd15, lam=lam)
        assert dial.ess.tolist() == [K] and len(images) == K


def test_the_scheduler_gets_its_step_back_and_a_new_one_is_followed(sd15):
    before = fingerprint(sd15.pipe.unet)
    corrected(sd15)
    assert "step" not in vars(sd15.pipe.scheduler) and fingerprint(sd15.pipe.unet) == before
    with realign(sd15.pipe, sd15.anchors["full1"], 0.5, particles=2):
        first = sd15.pipe.scheduler
        sample(sd15.pipe, (0,), num_images_per_prompt=2)
        sd15.pipe.scheduler = SCHEDULERS["euler"].from_config(first.config)
        sample(sd15.pipe, (0,), num_images_per_prompt=2)
        assert "step" not in vars(first) and "step" in vars(sd15.pipe.scheduler)
    assert "step" not in vars(sd15.pipe.scheduler)


def test_guidance_is_said_to_make_weights_a_heuristic_once(sd15):
    with pytest.warns(UserWarning, match="heuristic") as caught:
        corrected(sd15, guidance_scale=3.0)
    assert len([w for w in caught if "heuristic" in str(w.message)]) == 1


def test_a_batch_that_is_no_multiple_of_the_particles_is_refused(sd15):
    with (
        realign(sd15.pipe, sd15.anchors["full1"], 0.5, particles=3),
        pytest.raises(ValueError, match="give num_images_per_prompt=3"),
    ):
        sample(sd15.pipe, (0, 1))


@pytest.mark.filterwarnings("ignore:lam .* lies beyond")
def test_particles_are_weighed_by_the_lambda_that_the_trust_region_left(sd15, monkeypatch):
    told = []
    monkeypatch.setattr(
        "deradiff.realignment.resampling.log_weight",
        lambda factor, lams, differences: told.append(lams[0]) or torch.zeros(len(differences[0])),
    )
    with realign(sd15.pipe, sd15.anchors["full1"], 3.0, particles=2, trust_region=1e-6):
        sample(sd15.pipe, (0,), num_images_per_prompt=2, guidance_scale=1.0)
    assert told and all(1 <= float(lam.max()) < 1.1 for lam in told)
