"""Algorithm 1 against the closed form of Gaussian data, and against mixed outputs stepped by diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler

from deradiff.chain import realigned_chain

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHIFT, RHO = 1.5, 0.25  # the anchor's mean and variance; the reference is N(0, 1)


def exact_eps(mean: float, variance: float, scheduler):
    """The perfect denoiser of data N(mean, variance): eps = sqrt(1-abar) (x - sqrt(abar) mean) / (abar variance + 1 - abar)."""

    def eps(x, t):
        bar = scheduler.alphas_cumprod[int(t)].double()
        return (1 - bar).sqrt() * (x - bar.sqrt() * mean) / (bar * variance + 1 - bar)

    return eps


def samples(scheduler, lam: float, eta: float, steps: int, count: int = 20_000):
    scheduler.set_timesteps(steps)
    x = torch.randn(count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scheduler.init_noise_sigma
    reference, anchor = exact_eps(0.0, 1.0, scheduler), exact_eps(SHIFT, RHO, scheduler)
    return realigned_chain(reference, anchor, scheduler, x, lam, eta, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.5, 1.0])
def test_ancestral_chain_has_the_known_mean_and_variance(lam):
    """method: mean m (1 - rho^lam) / (1 - rho), variance (rho^(2 lam) - rho) / ((1 - 2 lam)(1 - rho)), for many steps."""
    x = samples(DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True), lam, eta=1.0, steps=1000)
    mean = SHIFT * (1 - RHO**lam) / (1 - RHO)
    variance = RHO * math.log(1 / RHO) / (1 - RHO) if lam == 0.5 else (RHO ** (2 * lam) - RHO) / ((1 - 2 * lam) * (1 - RHO))
    assert x.mean().item() == pytest.approx(mean, abs=0.03)
    assert x.var().item() == pytest.approx(variance, rel=0.03)


@pytest.mark.parametrize("lam", [0.25, 0.5])
def test_deterministic_chain_has_the_known_variance(lam):
    """method: variance v_ref^(1-lam) v_a^lam."""
    x = samples(DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True), lam, eta=0.0, steps=1000)
    assert x.var().item() == pytest.approx(RHO**lam, rel=0.03)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(**SD, clip_sample=False), EulerAncestralDiscreteScheduler(**SD)])
def test_a_chain_is_mixed_outputs_stepped_by_the_scheduler(scheduler):
    lam, shape = 0.4, (3, 4, 8, 8)

    def reference(x, t):
        return 0.9 * x.float().double()

    def anchor(x, t):
        return torch.tanh(x.float().double()) + 0.1

    scheduler.set_timesteps(10)
    start = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma).double()
    chained = realigned_chain(reference, anchor, scheduler, start, lam, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(10)
    x, generator = start, torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        mixed = torch.lerp(reference(scaled, t), anchor(scaled, t), lam)
        x = scheduler.step(mixed, t, x, generator=generator).prev_sample
    assert (chained - x).abs().max() < 1e-4 * x.std()  # diffusers keeps its constants in single precision
