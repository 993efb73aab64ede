"""What the method says of itself, held against exact networks and diffusers' real schedulers:
method tables, mixing error, corrector."""

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
V1, M2, V2 = 1.0, 1.5, 0.25  # a Gaussian reference N(0, V1) and its anchor N(M2, V2)
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


def law(scheduler, lam: float, eta: float) -> tuple[float, float]:
    """Mean and variance of the realigned chain between the two Gaussians: its steps are affine, so
    that two points tell a step's law."""
    models = [mixture([1.0], [m], [v**0.5]).model(scheduler) for m, v in ((0.0, V1), (M2, V2))]
    mean, variance, x = 0.0, 1.0, torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t in scheduler.timesteps:
        p = weighted_mixture(
            [transition(scheduler, t, x, model(x, t), eta) for model in models], [1 - lam, lam]
        )
        start, slope = p.mean[0].item(), (p.mean[1] - p.mean[0]).item()
        mean, variance = start + slope * mean, slope**2 * variance + p.variance.item()
    return mean, variance


@pytest.mark.parametrize("lam", [0.25, 0.5])
def test_ancestral_chains_end_where_the_closed_form_says(lam):
    """The form is that of many steps: 1000 of SD's schedule miss it by up to 2 %, in proportion to
    a step, and so does an exact model."""
    (mean, variance), (coarse_mean, coarse_variance) = (
        law(scheduler_of("ddpm", steps), lam, eta=1.0) for steps in (1000, 500)
    )
    expected = (
        V1 * RHO * math.log(1 / RHO) / (1 - RHO)
        if lam == 0.5
        else V1 * (RHO ** (2 * lam) - RHO) / ((1 - 2 * lam) * (1 - RHO))
    )
    assert variance == pytest.approx(expected, rel=0.025)
    assert 2 * mean - coarse_mean == pytest.approx(M2 * (1 - RHO**lam) / (1 - RHO), rel=0.01)
    assert 2 * variance - coarse_variance == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "steps", "lam"), [("ddim", 1000, 0.5), ("flow", 500, 0.25), ("flow", 500, 1.5)]
)
def test_deterministic_chains_end_where_the_closed_form_says(kind, steps, lam):
    """Variance V1^(1-lam) V2^lam; the mean is an integral over u = (sigma / alpha)^2, from where
    the schedule begins."""

    def phi(u):
        return (V1 + u) ** ((1 - lam) / 2) * (V2 + u) ** (lam / 2)

    start = math.inf if kind == "flow" else 14.6146**2
    mean, variance = law(scheduler_of(kind, steps), lam, eta=0.0)
    assert mean == pytest.approx(
        phi(0) * quad(lambda u: 0.5 * lam * M2 / ((V2 + u) * phi(u)), 0, start)[0], rel=0.01
    )
    assert variance == pytest.approx(V1 ** (1 - lam) * V2**lam, rel=0.01)


@pytest.mark.parametrize(
    "kind",
    ["ddim", "ddpm", "ancestral", "dpm++2m", "sde-dpm++2m", "flow", "flow-sde", "flow-stochastic"],
)
def test_a_gaussian_prior_and_a_linear_reward_are_mixed_without_error(kind):
    """Sample by sample the chain of the model that was aligned at lam s, at any number of steps and
    beyond the anchor too."""
    scheduler = scheduler_of(kind, 12)
    reference, anchor = (mixture([1.0], [m], [0.7]).model(scheduler) for m in (0.3, 1.5))
    for lam in (0.5, 2.0):
        exact = mixture([1.0], [0.3 + 1.2 * lam], [0.7]).model(scheduler)
        ends = [
            realigned_chain(
                *models, scheduler, noise(scheduler, 50), lam, 0.5, torch.Generator().manual_seed(1)
            )
            for models, lam in (((reference, anchor), lam), ((reference, exact), 1.0))
        ]
        assert (ends[0] - ends[1]).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("kind", "bed"), [("ddim", "lin"), ("ddim", "quad"), ("ddim", "bounded"), ("flow", "quad")]
)
def test_the_mixing_error_falls_with_the_fourth_power_of_beta(kind, bed):
    """KL of the realigned chain to the exact model's chain by the same sampler, so that what it
    discretises cancels: beta 2, 4 times."""
    scheduler, errors = scheduler_of(kind, 50), []
    for strength in (BEDS[bed].strength / 2, BEDS[bed].strength / 4):
        reference, anchor, exact = BEDS[bed].models(scheduler, [0, strength, strength / 2])
        ends = [
            realigned_chain(reference, model, scheduler, even_noise(scheduler, 4000), lam)[:, 0]
            for model, lam in ((anchor, 0.5), (exact, 1.0))
        ]
        errors.append(kl_between(*ends))
    assert 12 < errors[0] / errors[1] < 17


@cache
def ancestral(bed: str):
    scheduler = scheduler_of("ancestral", 50)
    return scheduler, BEDS[bed].models(scheduler, [0, BEDS[bed].strength])


def realigned(bed: str, lam: float, images: int, **options) -> torch.Tensor:
    """Samples of the realigned chain, ancestral with 50 steps."""
    scheduler, models = ancestral(bed)
    start = noise(scheduler, images * options.get("particles", Particles(1)).count)
    return realigned_chain(
        *models, scheduler, start, lam, 1.0, torch.Generator().manual_seed(1), **options
    )[:, 0]


def test_four_particles_bring_the_quadratic_bed_to_the_floor():
    cloud = Particles(4)
    corrected, mixed = realigned("quad", 0.5, 8_000, particles=cloud), realigned("quad", 0.5, 8_000)
    quantiles = QUAD.quantiles(0.5 * QUAD.strength, 8_000)
    assert w2(corrected, quantiles) <= 0.1 < 0.2 < w2(mixed, quantiles)
    assert cloud.ess.shape == (8_000,) and cloud.ess.min() >= 1 and 2 < cloud.ess.mean() < 3.9


@pytest.mark.parametrize("kind", ["flow", "flow-sde"])
def test_particles_mend_flows_with_and_without_noise(kind):
    """In the ODE copies of a particle stay together, and yet the weights mend the mixture."""
    scheduler = scheduler_of(kind, 50)
    reference, anchor = LIN.models(scheduler, [0, LIN.strength])
    kls = []
    for count in (1, 4):
        start, generator = noise(scheduler, 5_000 * count), torch.Generator().manual_seed(1)
        x = realigned_chain(
            reference, anchor, scheduler, start, 0.5, generator=generator, particles=count
        )[:, 0]
        kls.append(kl_of_samples(x, LIN.log_density(0.5 * LIN.strength)))
    assert kls[1] < 0.5 * kls[0]


def test_networks_on_a_grid_are_those_of_mixtures_in_closed_form():
    """Two ways to the same exact network, for every prediction type."""
    b, q = (
        torch.tensor([1.8], dtype=torch.float64),
        torch.tensor([2.0], dtype=torch.float64),
    )  # -(x - .9)^2, but for a constant
    tilted = PRIOR.tilted(b, q)
    torch.testing.assert_close(
        tilted.log_density(GRID[:, None]), QUAD.log_density(1.0), atol=1e-6, rtol=0
    )
    for prediction in ("epsilon", "v_prediction", "sample", "flow"):
        scheduler = (
            scheduler_of("flow", 10)
            if prediction == "flow"
            else DDIMScheduler(**SD, clip_sample=False, prediction_type=prediction)
        )
        scheduler.set_timesteps(10)
        (on_grid,) = QUAD.models(scheduler, [1.0])
        x = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
        for t in scheduler.timesteps[:-1]:  # flow's last noise is narrower than the grid's spacing
            torch.testing.assert_close(
                on_grid(x, t), tilted.model(scheduler)(x, t), atol=1e-8, rtol=0
            )


def test_a_trust_region_bounds_what_lies_beyond_the_anchor():
    """0.3 nats for the whole chain, an even share a step: KL of the bounded bed at lam = 3 from
    over .2 to under it."""
    target = BOUNDED.log_density(3.0 * BOUNDED.strength)
    free, bounded = (
        realigned("bounded", 3.0, 20_000),
        realigned("bounded", 3.0, 20_000, trust_region=0.3),
    )
    assert kl_of_samples(bounded, target) < 0.15 < 0.2 < kl_of_samples(free, target)
    anchor = realigned("bounded", 1.0, 500)
    assert (realigned("bounded", 3.0, 500, trust_region=1e-12) - anchor).abs().max() < 1e-4
    assert torch.equal(realigned("bounded", 1.0, 500, trust_region=0.3), anchor), (
        "up to lam = 1 nothing is shortened"
    )


@pytest.mark.slow
def test_two_anchors_in_the_plane_reach_their_modes_with_four_particles():
    """Weights (.5, .5): total variation of the modes' shares to the target, within .03 of the exact
    model's by the same sampler."""
    bed, lams, images = Plane(), [0.5, 0.5], 20_000
    scheduler = scheduler_of("ancestral", 50)
    reference, target, *anchors = (
        m.model(scheduler) for m in (bed.prior, bed.target(lams), *bed.anchors)
    )

    def distance(models, lams, particles=1):
        start, generator = noise(scheduler, images * particles, 2), torch.Generator().manual_seed(1)
        x = realigned_chain(
            reference, models, scheduler, start, lams, 1.0, generator, particles=particles
        )
        return 0.5 * (bed.mode_shares(x) - bed.exact_mode_shares([0.5, 0.5])).abs().sum().item()

    floor, mixed, corrected = (
        distance([target], [1.0]),
        distance(anchors, lams),
        distance(anchors, lams, 4),
    )
    assert corrected < floor + 0.03
    assert corrected < mixed
