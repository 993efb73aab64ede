"""Algorithm 1 against the closed form of Gaussian data, and against mixed outputs in diffusers.

Shapes: x (B, 1) for data on a line, and (B, C, 8, 8) or (B, C, 4, 4) for latents.
"""

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

# The reference is N(0, 1), and the anchor N(MEAN, RHO).
MEAN = 1.5
RHO = 0.25


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact_eps(mean: float, variance: float, scheduler):
    """The perfect denoiser of data N(mean, variance).

    eps = sqrt(1 - abar) (x - sqrt(abar) mean) / (abar variance + 1 - abar)
    """

    def eps(x, t):
        bar = scheduler.alphas_cumprod[int(t)].double()
        return (1 - bar).sqrt() * (x - bar.sqrt() * mean) / (bar * variance + 1 - bar)

    return eps


def chain_ends(start, lam: float, eta: float, steps: int):
    """Where DDIM's realigned chain between the two Gaussians ends."""
    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    reference = exact_eps(0.0, 1.0, scheduler)
    anchor = exact_eps(MEAN, RHO, scheduler)
    return realigned_chain(reference, anchor, scheduler, start, lam, eta, seeded(1))


@pytest.mark.parametrize("lam", [0.25, 1.0])
def test_ancestral_chain_has_the_known_mean_and_variance(lam):
    """For many steps; m and rho are the anchor's mean and variance.

    mean m (1 - rho^lam) / (1 - rho), variance (rho^(2 lam) - rho) / ((1 - 2 lam) (1 - rho))
    """
    start = torch.randn(5_000, 1, generator=seeded(0), dtype=torch.float64)
    x = chain_ends(start, lam, eta=1.0, steps=250)
    mean = MEAN * (1 - RHO**lam) / (1 - RHO)
    variance = (RHO ** (2 * lam) - RHO) / ((1 - 2 * lam) * (1 - RHO))
    assert x.mean().item() == pytest.approx(mean, abs=0.04)
    assert x.var().item() == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("lam", [0.25, 0.5])
def test_deterministic_chain_has_the_known_variance(lam):
    """v_ref^(1 - lam) v_a^lam. The chain is an affine map of the noise: two points are enough."""
    start = torch.tensor([[0.0], [1.0]]).double()
    x = chain_ends(start, lam, eta=0.0, steps=1000)
    assert x.diff(dim=0).item() ** 2 == pytest.approx(RHO**lam, rel=0.01)


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler(**SD, clip_sample=False), EulerAncestralDiscreteScheduler(**SD)]
)
def test_a_chain_is_mixed_outputs_stepped_by_the_scheduler(scheduler):
    lam = 0.4

    def reference(x, t):
        return 0.9 * x.float().double()

    def anchor(x, t):
        return torch.tanh(x.float().double()) + 0.1

    scheduler.set_timesteps(10)
    start = torch.randn(3, 4, 8, 8, generator=seeded(0)) * scheduler.init_noise_sigma
    start = start.double()
    chained = realigned_chain(reference, anchor, scheduler, start, lam, generator=seeded(1))

    # The same in diffusers.
    scheduler.set_timesteps(10)
    x = start
    generator = seeded(1)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        mixed = torch.lerp(reference(scaled, t), anchor(scaled, t), lam)
        x = scheduler.step(mixed, t, x, generator=generator).prev_sample

    # diffusers keeps its constants in single precision.
    assert (chained - x).abs().max() < 1e-4 * x.std()


def test_several_anchors_are_their_weighted_outputs_stepped_once_with_one_history():
    """In second-order DPM++, with a schedule of masks and a number for each row at once."""
    scheduler = DPMSolverMultistepScheduler(**SD)
    scheduler.set_timesteps(16)
    mask = torch.linspace(0, 0.4, 64).view(8, 8)
    by_row = torch.tensor([0.0, 0.5, 1.0])
    start = torch.randn(3, 4, 8, 8, generator=seeded(0))

    def reference(x, t):
        return 0.9 * x

    def first_anchor(x, t):
        return torch.tanh(x) + 0.1

    def second_anchor(x, t):
        return 0.8 * x.roll(1, 1)

    anchors = [first_anchor, second_anchor]
    lams = [lambda fraction: mask * fraction, by_row]
    chained = realigned_chain(reference, anchors, scheduler, start, lams)

    x = start
    for t in scheduler.timesteps:
        output = reference(x, t)
        first = mask * (1 - t / 1000) * (first_anchor(x, t) - output)
        second = by_row.view(3, 1, 1, 1) * (second_anchor(x, t) - output)
        x = scheduler.step(output + first + second, t, x).prev_sample
    torch.testing.assert_close(chained, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("particles", [1, 4])
def test_an_image_does_not_depend_on_its_batch(particles):
    scheduler = EulerAncestralDiscreteScheduler(**SD)
    scheduler.set_timesteps(8)
    start = torch.randn(3 * particles, 2, 4, 4, generator=seeded(0)) * scheduler.init_noise_sigma

    def reference(x, t):
        return 0.5 * x

    def anchor(x, t):
        return torch.tanh(2 * x) + 0.2

    def sampled(first: int, end: int):
        """Images and their effective sample sizes."""
        rows = range(first * particles, end * particles)
        generators = [seeded(row) for row in rows]
        cloud = Particles(particles)
        own_start = start[rows.start : rows.stop]
        images = realigned_chain(
            reference, anchor, scheduler, own_start, 0.5, generator=generators, particles=cloud
        )
        return images, cloud.ess

    together, ess = sampled(0, 3)
    assert together.shape == (3, 2, 4, 4)
    assert ess.shape == (3,)
    assert particles == 1 or (ess < 3).all()
    for i in range(3):
        alone, own_ess = sampled(i, i + 1)
        torch.testing.assert_close(together[i : i + 1], alone)
        torch.testing.assert_close(ess[i : i + 1], own_ess)


def test_learned_variances_are_mixed_by_precision():
    """Against a chain by hand. A chain of mixed outputs would be another one."""
    scheduler = DDPMScheduler(**SD, clip_sample=False, variance_type="learned_range")
    scheduler.set_timesteps(6)
    start = torch.randn(2, 3, 4, 4, generator=seeded(0)).double()
    lam = 0.4

    def reference(x, t):
        return torch.cat([0.9 * x, torch.full_like(x, -0.9)], 1)

    def anchor(x, t):
        return torch.cat([torch.tanh(x), 0.9 * x.sin()], 1)

    chained = realigned_chain(reference, anchor, scheduler, start, lam, generator=seeded(1))

    x = start
    generator = seeded(1)
    for t in scheduler.timesteps:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        p_ref = transition(scheduler, t, x, reference(x, t))
        p_a = transition(scheduler, t, x, anchor(x, t))
        if t == 0:
            x = (1 - lam) * p_ref.mean + lam * p_a.mean
            continue
        precision = (1 - lam) / p_ref.variance + lam / p_a.variance
        weighted_means = (1 - lam) * p_ref.mean / p_ref.variance + lam * p_a.mean / p_a.variance
        x = weighted_means / precision + noise / precision.sqrt()
    torch.testing.assert_close(chained, x)


def test_a_trust_region_shortens_each_steps_overshoot_to_its_share():
    """lam - 1 = sqrt(nats / (c |D|^2)), where that is less. One step, whose c is 1/2."""
    scheduler = DDIMScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(1)
    x = torch.randn(3, 2, generator=seeded(0), dtype=torch.float64)
    # |D| = 0.01, 5 and 1.
    difference = torch.tensor([[0.01, 0.0], [3.0, 4.0], [0.6, 0.8]], dtype=torch.float64)
    moved = realigned_chain(
        lambda x, t: 0 * x, lambda x, t: difference, scheduler, x, 3.0, trust_region=0.5
    )

    # How far the step went, in units of the step from the reference to the anchor.
    t = scheduler.timesteps[0]
    reference = transition(scheduler, t, x, 0 * x).mean
    anchor = transition(scheduler, t, x, difference).mean
    lams = (moved - reference).norm(dim=1) / (anchor - reference).norm(dim=1)
    expected = torch.tensor([3.0, 1 + 1 / 5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(lams, expected)


def test_arguments_that_do_not_fit_each_other_are_refused():
    scheduler = DDIMScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(2)
    x = torch.randn(6, 2)

    def model(x, t):
        return x

    with pytest.raises(ValueError, match="6 rows are no multiple of particles=4"):
        realigned_chain(model, model, scheduler, x, 0.5, particles=4)
    with pytest.raises(ValueError, match="2 anchors need 2 values of lam, and there are 1"):
        realigned_chain(model, [model, model], scheduler, x, [0.5])
    with pytest.raises(ValueError, match="trust_region is for one anchor"):
        realigned_chain(model, [model, model], scheduler, x, [0.5, 1.0], trust_region=1.0)


def test_a_resampled_particle_keeps_its_history():
    """Second-order DPM++ has no noise. The particle that takes all ends as its own chain would."""
    scheduler = DPMSolverMultistepScheduler(**SD)
    scheduler.set_timesteps(16)

    def reference(x, t):
        return 0.9 * torch.tanh(x)

    def anchor(x, t):
        return reference(x, t) + torch.where(x > 0, 30.0, 0.0)

    start = torch.tensor([[3.0], [2.0], [-1.0], [2.5]], dtype=torch.float64)
    chosen = realigned_chain(reference, anchor, scheduler, start, 0.5, particles=4)
    alone = realigned_chain(reference, anchor, scheduler, start[2:3], 0.5)
    torch.testing.assert_close(chosen, alone)
