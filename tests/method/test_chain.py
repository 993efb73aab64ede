"""Algorithm 1 against the closed form of Gaussian data, and against mixed outputs stepped by
diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)

from deradiff.method.chain import realigned_chain
from deradiff.method.particles import Particles
from deradiff.method.transitions import transition

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHIFT, RHO = 1.5, 0.25  # the anchor's mean and variance; the reference is N(0, 1)


def exact_eps(mean: float, variance: float, scheduler):
    """The perfect denoiser of data N(mean, variance): eps = sqrt(1-abar) (x - sqrt(abar) mean) /
    (abar variance + 1 - abar)."""

    def eps(x, t):
        bar = scheduler.alphas_cumprod[int(t)].double()
        return (1 - bar).sqrt() * (x - bar.sqrt() * mean) / (bar * variance + 1 - bar)

    return eps


def ends(scheduler, start, lam: float, eta: float, steps: int):
    scheduler.set_timesteps(steps)
    reference, anchor = exact_eps(0.0, 1.0, scheduler), exact_eps(SHIFT, RHO, scheduler)
    return realigned_chain(
        reference, anchor, scheduler, start, lam, eta, torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("lam", [0.25, 1.0])
def test_ancestral_chain_has_the_known_mean_and_variance(lam):
    """method: mean m (1 - rho^lam) / (1 - rho), variance (rho^(2 lam) - rho) / ((1 - 2 lam)(1 -
    rho)), for many steps."""
    start = torch.randn(5_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = ends(
        DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True),
        start,
        lam,
        eta=1.0,
        steps=250,
    )
    assert x.mean().item() == pytest.approx(SHIFT * (1 - RHO**lam) / (1 - RHO), abs=0.04)
    assert x.var().item() == pytest.approx(
        (RHO ** (2 * lam) - RHO) / ((1 - 2 * lam) * (1 - RHO)), rel=0.1
    )


@pytest.mark.parametrize("lam", [0.25, 0.5])
def test_deterministic_chain_has_the_known_variance(lam):
    """method: variance v_ref^(1-lam) v_a^lam; an affine map of the noise, whose slope two points
    tell."""
    x = ends(
        DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True),
        torch.tensor([[0.0], [1.0]]).double(),
        lam,
        0.0,
        1000,
    )
    assert x.diff(dim=0).item() ** 2 == pytest.approx(RHO**lam, rel=0.01)


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler(**SD, clip_sample=False), EulerAncestralDiscreteScheduler(**SD)]
)
def test_a_chain_is_mixed_outputs_stepped_by_the_scheduler(scheduler):
    lam, shape = 0.4, (3, 4, 8, 8)

    def reference(x, t):
        return 0.9 * x.float().double()

    def anchor(x, t):
        return torch.tanh(x.float().double()) + 0.1

    scheduler.set_timesteps(10)
    start = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    ).double()
    chained = realigned_chain(
        reference, anchor, scheduler, start, lam, generator=torch.Generator().manual_seed(1)
    )
    scheduler.set_timesteps(10)
    x, generator = start, torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        mixed = torch.lerp(reference(scaled, t), anchor(scaled, t), lam)
        x = scheduler.step(mixed, t, x, generator=generator).prev_sample
    assert (
        chained - x
    ).abs().max() < 1e-4 * x.std()  # diffusers keeps its constants in single precision


def test_several_anchors_are_their_weighted_outputs_stepped_once_with_one_history():
    """Second-order DPM++ as the sampler: its history is the mixed chain's. A schedule, a number a
    row and a mask at once."""
    scheduler = DPMSolverMultistepScheduler(**SD)
    scheduler.set_timesteps(16)
    mask = torch.linspace(0, 0.4, 64).view(8, 8)
    start = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    models = [
        lambda x, t: 0.9 * x,
        lambda x, t: torch.tanh(x) + 0.1,
        lambda x, t: 0.8 * x.roll(1, 1),
    ]
    lams = [lambda fraction: mask * fraction, torch.tensor([0.0, 0.5, 1.0])]
    chained = realigned_chain(models[0], models[1:], scheduler, start, lams)
    x = start
    for t in scheduler.timesteps:
        first, second = mask * (1 - t / 1000), lams[1].view(3, 1, 1, 1)
        reference, *anchors = (model(x, t) for model in models)
        mixed = reference + first * (anchors[0] - reference) + second * (anchors[1] - reference)
        x = scheduler.step(mixed, t, x).prev_sample
    torch.testing.assert_close(chained, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("particles", [1, 4])
def test_an_image_does_not_depend_on_its_batch(particles):
    scheduler = EulerAncestralDiscreteScheduler(**SD)
    scheduler.set_timesteps(8)
    start = (
        torch.randn(3 * particles, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        * scheduler.init_noise_sigma
    )

    def sampled(images: slice):
        rows = slice(images.start * particles, images.stop * particles)
        generators = [torch.Generator().manual_seed(i) for i in range(rows.start, rows.stop)]
        cloud = Particles(particles)
        models = (lambda x, t: 0.5 * x, lambda x, t: torch.tanh(2 * x) + 0.2)
        return realigned_chain(
            *models, scheduler, start[rows], 0.5, generator=generators, particles=cloud
        ), cloud.ess

    together, ess = sampled(slice(0, 3))
    assert (
        together.shape == (3, 2, 4, 4) and ess.shape == (3,) and (particles == 1 or (ess < 3).all())
    )
    for i in range(3):
        alone, own = sampled(slice(i, i + 1))
        torch.testing.assert_close(together[i : i + 1], alone)
        torch.testing.assert_close(ess[i : i + 1], own)


def test_learned_variances_are_mixed_by_precision():
    """Against a chain by hand; where the models' variances differ, a chain of mixed outputs is
    another."""
    scheduler = DDPMScheduler(**SD, clip_sample=False, variance_type="learned_range")
    scheduler.set_timesteps(6)
    start, lam = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double(), 0.4
    models = [
        lambda x, t: torch.cat([0.9 * x, torch.full_like(x, -0.9)], 1),
        lambda x, t: torch.cat([torch.tanh(x), 0.9 * x.sin()], 1),
    ]
    chained = realigned_chain(
        *models, scheduler, start, lam, generator=torch.Generator().manual_seed(1)
    )
    x, generator = start, torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        a, b = (transition(scheduler, t, x, model(x, t)) for model in models)
        if t == 0:
            x = (1 - lam) * a.mean + lam * b.mean
            continue
        precision = (1 - lam) / a.variance + lam / b.variance
        x = (
            (1 - lam) * a.mean / a.variance + lam * b.mean / b.variance
        ) / precision + noise / precision.sqrt()
    torch.testing.assert_close(chained, x)


def test_a_trust_region_shortens_each_steps_overshoot_to_its_share():
    """One step, one row of them: lam - 1 = sqrt(nats / (c |D|^2)), c = L / 2, and where lam is less
    than that it stays."""
    scheduler = DDIMScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(1)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pulls = torch.tensor(
        [[0.01, 0.0], [3.0, 4.0], [0.6, 0.8]], dtype=torch.float64
    )  # |D| = .01, 5, 1
    moved = realigned_chain(
        lambda x, t: 0 * x, lambda x, t: pulls, scheduler, x, 3.0, trust_region=0.5
    )
    t = scheduler.timesteps[0]
    step = transition(scheduler, t, x, pulls).mean - transition(scheduler, t, x, 0 * x).mean
    went = (moved - transition(scheduler, t, x, 0 * x).mean).norm(dim=1) / step.norm(dim=1)
    torch.testing.assert_close(
        went, torch.tensor([3.0, 1 + 1 / 5, 2.0], dtype=torch.float64)
    )  # the last step's c is 1/2


def test_what_does_not_fit_is_refused():
    scheduler = DDIMScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(2)
    x, model = torch.randn(6, 2), lambda x, t: x
    with pytest.raises(ValueError, match="6 rows are no multiple of particles=4"):
        realigned_chain(model, model, scheduler, x, 0.5, particles=4)
    with pytest.raises(ValueError, match="2 anchors need 2 values of lam, and there are 1"):
        realigned_chain(model, [model, model], scheduler, x, [0.5])
    with pytest.raises(ValueError, match="trust_region is for one anchor"):
        realigned_chain(model, [model, model], scheduler, x, [0.5, 1.0], trust_region=1.0)


def test_a_resampled_particle_keeps_its_history():
    """Second-order DPM++, without noise: where one particle takes all, the image is that particle's
    own chain."""
    scheduler = DPMSolverMultistepScheduler(**SD)
    scheduler.set_timesteps(16)
    models = (lambda x, t: 0.9 * torch.tanh(x), lambda x, t: 0.9 * torch.tanh(x) + 30.0 * (x > 0))
    start = torch.tensor([[3.0], [2.0], [-1.0], [2.5]], dtype=torch.float64)
    chosen = realigned_chain(*models, scheduler, start, 0.5, particles=4)
    torch.testing.assert_close(chosen, realigned_chain(*models, scheduler, start[2:3], 0.5))
