"""The method's figures, with exact networks and diffusers' real schedulers.

The closed forms of a realigned chain, the error of mixing step by step, and what particles and a
trust region do about it.

Shapes: samples on the line (N, 1), in the plane (N, 2).
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from scipy.integrate import quad

from deradiff.method.chain import realigned_chain
from deradiff.method.gaussian import weighted_mixture
from deradiff.method.particles import Particles
from deradiff.method.schedulers import FlowMatchSDEScheduler
from deradiff.method.transitions import transition
from deradiff.worlds.beds import (
    BOUNDED,
    GRID,
    LIN,
    PRIOR,
    QUAD,
    Plane,
    even_noise,
    kl_between,
    kl_of_samples,
    mixture,
    noise,
    w2,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BEDS = {"lin": LIN, "quad": QUAD, "bounded": BOUNDED}

# A Gaussian reference N(0, V1), and its anchor N(M2, V2).
V1 = 1.0
M2 = 1.5
V2 = 0.25
RHO = V2 / V1


def scheduler_of(kind: str, steps: int):
    scheduler = {
        "ddim": lambda: DDIMScheduler(
            **SD, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
        ),
        "ddpm": lambda: DDPMScheduler(**SD, clip_sample=False),
        "ancestral": lambda: EulerAncestralDiscreteScheduler(**SD),
        "dpm++2m": lambda: DPMSolverMultistepScheduler(**SD),
        "sde-dpm++2m": lambda: DPMSolverMultistepScheduler(**SD, algorithm_type="sde-dpmsolver++"),
        "flow": lambda: FlowMatchEulerDiscreteScheduler(),
        "flow-sde": FlowMatchSDEScheduler,
        "flow-stochastic": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    }[kind]()
    scheduler.set_timesteps(steps)
    return scheduler


def gaussian_model(scheduler, mean: float, variance: float):
    """The exact network of data N(mean, variance)."""
    return mixture([1.0], [mean], [variance**0.5]).model(scheduler)


def chain_law(scheduler, lam: float, eta: float) -> tuple[float, float]:
    """Mean and variance at the end of the realigned chain between the two Gaussians.

    Its steps are affine, so that two points give a step's law.
    """
    models = [gaussian_model(scheduler, 0.0, V1), gaussian_model(scheduler, M2, V2)]
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mean = 0.0
    variance = 1.0
    for t in scheduler.timesteps:
        steps = [transition(scheduler, t, x, model(x, t), eta) for model in models]
        p = weighted_mixture(steps, [1 - lam, lam])
        start = p.mean[0].item()
        slope = (p.mean[1] - p.mean[0]).item()
        mean = start + slope * mean
        variance = slope**2 * variance + p.variance.item()
    return mean, variance


@pytest.mark.parametrize("lam", [0.25, 0.5])
def test_ancestral_chains_end_where_the_closed_form_says(lam):
    """The form is that of many steps.

    1000 steps miss it by up to 2 %, in proportion to a step's length, and so does an exact model.
    """
    mean, variance = chain_law(scheduler_of("ddpm", 1000), lam, eta=1.0)
    coarse_mean, coarse_variance = chain_law(scheduler_of("ddpm", 500), lam, eta=1.0)
    expected_mean = M2 * (1 - RHO**lam) / (1 - RHO)
    if lam == 0.5:
        expected_variance = V1 * RHO * math.log(1 / RHO) / (1 - RHO)
    else:
        expected_variance = V1 * (RHO ** (2 * lam) - RHO) / ((1 - 2 * lam) * (1 - RHO))
    assert variance == pytest.approx(expected_variance, rel=0.025)

    # Extrapolated to steps of length 0.
    assert 2 * mean - coarse_mean == pytest.approx(expected_mean, rel=0.01)
    assert 2 * variance - coarse_variance == pytest.approx(expected_variance, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "steps", "lam"), [("ddim", 1000, 0.5), ("flow", 500, 0.25), ("flow", 500, 1.5)]
)
def test_deterministic_chains_end_where_the_closed_form_says(kind, steps, lam):
    """Variance V1^(1 - lam) V2^lam, and a mean that is an integral over u = (sigma / alpha)^2."""

    def phi(u):
        return (V1 + u) ** ((1 - lam) / 2) * (V2 + u) ** (lam / 2)

    def integrand(u):
        return 0.5 * lam * M2 / ((V2 + u) * phi(u))

    # Where the schedule begins.
    start = math.inf if kind == "flow" else 14.6146**2
    integral, _ = quad(integrand, 0, start)
    mean, variance = chain_law(scheduler_of(kind, steps), lam, eta=0.0)
    assert mean == pytest.approx(phi(0) * integral, rel=0.01)
    assert variance == pytest.approx(V1 ** (1 - lam) * V2**lam, rel=0.01)


@pytest.mark.parametrize(
    "kind",
    ["ddim", "ddpm", "ancestral", "dpm++2m", "sde-dpm++2m", "flow", "flow-sde", "flow-stochastic"],
)
def test_a_gaussian_prior_and_a_linear_reward_are_mixed_without_error(kind):
    """Each sample is that of the model aligned at lam s, with few steps and beyond the anchor."""
    scheduler = scheduler_of(kind, 12)
    reference = mixture([1.0], [0.3], [0.7]).model(scheduler)
    anchor = mixture([1.0], [1.5], [0.7]).model(scheduler)
    start = noise(scheduler, 50)

    def chain_end(model, lam):
        generator = torch.Generator().manual_seed(1)
        return realigned_chain(reference, model, scheduler, start, lam, 0.5, generator)

    for lam in (0.5, 2.0):
        exact = mixture([1.0], [0.3 + 1.2 * lam], [0.7]).model(scheduler)
        assert (chain_end(anchor, lam) - chain_end(exact, 1.0)).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("kind", "bed"), [("ddim", "lin"), ("ddim", "quad"), ("ddim", "bounded"), ("flow", "quad")]
)
def test_the_mixing_error_falls_with_the_fourth_power_of_beta(kind, bed):
    """KL of the realigned chain to the exact model's, at beta 2 and 4 times as large.

    Both chains use the same sampler, so that its own error cancels.
    """
    scheduler = scheduler_of(kind, 50)
    start = even_noise(scheduler, 4000)
    errors = []
    for strength in (BEDS[bed].strength / 2, BEDS[bed].strength / 4):
        reference, anchor, exact = BEDS[bed].models(scheduler, [0, strength, strength / 2])
        mixed_end = realigned_chain(reference, anchor, scheduler, start, 0.5)[:, 0]
        exact_end = realigned_chain(reference, exact, scheduler, start, 1.0)[:, 0]
        errors.append(kl_between(mixed_end, exact_end))
    assert 12 < errors[0] / errors[1] < 17


@cache
def ancestral_models(bed: str):
    """Euler ancestral with 50 steps, and the reference and the anchor of a bed."""
    scheduler = scheduler_of("ancestral", 50)
    return scheduler, BEDS[bed].models(scheduler, [0, BEDS[bed].strength])


def realigned(bed: str, lam: float, images: int, **options) -> torch.Tensor:
    """Samples of the realigned chain (images,)."""
    scheduler, (reference, anchor) = ancestral_models(bed)
    count = options["particles"].count if "particles" in options else 1
    start = noise(scheduler, images * count)
    generator = torch.Generator().manual_seed(1)
    x = realigned_chain(reference, anchor, scheduler, start, lam, 1.0, generator, **options)
    return x[:, 0]


def test_four_particles_bring_the_quadratic_bed_to_the_floor():
    cloud = Particles(4)
    corrected = realigned("quad", 0.5, 8_000, particles=cloud)
    mixed = realigned("quad", 0.5, 8_000)
    quantiles = QUAD.quantiles(0.5 * QUAD.strength, 8_000)
    assert w2(corrected, quantiles) <= 0.1
    assert w2(mixed, quantiles) > 0.2
    assert cloud.ess.shape == (8_000,)
    assert cloud.ess.min() >= 1
    assert 2 < cloud.ess.mean() < 3.9


@pytest.mark.parametrize("kind", ["flow", "flow-sde"])
def test_particles_correct_flows_with_and_without_noise(kind):
    """In the ODE copies of a particle stay together, and yet the weights correct the mixture."""
    scheduler = scheduler_of(kind, 50)
    reference, anchor = LIN.models(scheduler, [0, LIN.strength])
    target = LIN.log_density(0.5 * LIN.strength)
    kls = []
    for count in (1, 4):
        start = noise(scheduler, 5_000 * count)
        generator = torch.Generator().manual_seed(1)
        x = realigned_chain(
            reference, anchor, scheduler, start, 0.5, generator=generator, particles=count
        )
        kls.append(kl_of_samples(x[:, 0], target))
    assert kls[1] < 0.5 * kls[0]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_networks_on_a_grid_are_those_of_mixtures_in_closed_form(prediction):
    # The tilt by -(x - 0.9)^2 = 1.8 x - 2 x^2 / 2, but for a constant.
    linear = torch.tensor([1.8], dtype=torch.float64)
    quadratic = torch.tensor([2.0], dtype=torch.float64)
    tilted = PRIOR.tilted(linear, quadratic)
    log_density = tilted.log_density(GRID[:, None])
    torch.testing.assert_close(log_density, QUAD.log_density(1.0), atol=1e-6, rtol=0)

    if prediction == "flow":
        scheduler = scheduler_of("flow", 10)
    else:
        scheduler = DDIMScheduler(**SD, clip_sample=False, prediction_type=prediction)
        scheduler.set_timesteps(10)
    (on_grid,) = QUAD.models(scheduler, [1.0])
    in_closed_form = tilted.model(scheduler)
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    # The last noise of the flow is narrower than the spacing of the grid.
    for t in scheduler.timesteps[:-1]:
        torch.testing.assert_close(on_grid(x, t), in_closed_form(x, t), atol=1e-8, rtol=0)


def test_a_trust_region_bounds_what_lies_beyond_the_anchor():
    """0.3 nats for the whole chain, in equal shares for each step."""
    target = BOUNDED.log_density(3.0 * BOUNDED.strength)
    free = realigned("bounded", 3.0, 20_000)
    limited = realigned("bounded", 3.0, 20_000, trust_region=0.3)
    assert kl_of_samples(limited, target) < 0.15
    assert kl_of_samples(free, target) > 0.2

    # With nothing to go beyond the anchor, the chain is the anchor's.
    anchor = realigned("bounded", 1.0, 500)
    smallest = realigned("bounded", 3.0, 500, trust_region=1e-12)
    assert (smallest - anchor).abs().max() < 1e-4

    # Up to lam = 1 nothing is shortened.
    assert torch.equal(realigned("bounded", 1.0, 500, trust_region=0.3), anchor)


@pytest.mark.slow
def test_two_anchors_in_the_plane_reach_their_modes_with_four_particles():
    """Total variation of the modes' shares to the target, near that of the exact model."""
    bed = Plane()
    lams = [0.5, 0.5]
    images = 20_000
    scheduler = scheduler_of("ancestral", 50)
    reference = bed.prior.model(scheduler)
    target = bed.target(lams).model(scheduler)
    anchors = [anchor.model(scheduler) for anchor in bed.anchors]

    def distance(models, lams, particles=1):
        start = noise(scheduler, images * particles, 2)
        generator = torch.Generator().manual_seed(1)
        x = realigned_chain(
            reference, models, scheduler, start, lams, 1.0, generator, particles=particles
        )
        return 0.5 * (bed.mode_shares(x) - bed.exact_mode_shares([0.5, 0.5])).abs().sum().item()

    floor = distance([target], [1.0])
    mixed = distance(anchors, lams)
    corrected = distance(anchors, lams, 4)
    assert corrected < floor + 0.03
    assert corrected < mixed
