"""The closed form of each sampler's step against the step of diffusers.

The paper's claim is tested with it: to mix outputs and step once is to mix the models' Gaussians.

Shapes: x and outputs (2, 4, 8, 8), in double precision.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from deradiff.method.gaussian import geometric_mixture
from deradiff.method.schedulers import FlowMatchSDEScheduler
from deradiff.method.steps import step_at
from deradiff.method.transitions import data_prediction, kl_factors, network_input, transition

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
UNCLIPPED = {"clip_sample": False}
TRAILING = {"timestep_spacing": "trailing"}
TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
FLOW_DPM = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}

DDIM = DDIMScheduler
DDPM = DDPMScheduler
EULER = EulerDiscreteScheduler
ANCESTRAL = EulerAncestralDiscreteScheduler
DPM = DPMSolverMultistepScheduler
FLOW = FlowMatchEulerDiscreteScheduler
FLOW_SDE = FlowMatchSDEScheduler


class Case(NamedTuple):
    """A scheduler and how it samples."""

    scheduler: type
    settings: dict[str, Any]
    eta: float
    steps: int = 20


SAMPLERS = {
    "ddim": Case(DDIM, UNCLIPPED | {"set_alpha_to_one": False, "steps_offset": 1}, eta=0.0),
    "ddim-eta": Case(DDIM, UNCLIPPED, eta=0.6),
    "ddim-trailing": Case(DDIM, UNCLIPPED | TRAILING, eta=1.0),
    "ddim-v-zero-snr": Case(
        DDIM, UNCLIPPED | V | TRAILING | {"rescale_betas_zero_snr": True}, eta=0.3
    ),
    "ddim-sample": Case(DDIM, UNCLIPPED | X0, eta=0.3),
    "ddpm": Case(DDPM, UNCLIPPED, eta=1.0),
    "ddpm-large-v": Case(
        DDPM, UNCLIPPED | V | {"variance_type": "fixed_large", "steps_offset": 1}, eta=1.0
    ),
    "ddpm-log-sample": Case(DDPM, UNCLIPPED | X0 | {"variance_type": "fixed_small_log"}, eta=1.0),
    "euler-ancestral": Case(ANCESTRAL, {"timestep_spacing": "leading", "steps_offset": 1}, eta=1.0),
    "euler-ancestral-v": Case(ANCESTRAL, V, eta=1.0),
    "euler": Case(EULER, {}, eta=0.0),
    "euler-karras-v": Case(EULER, V | TO_SIGMA_MIN | {"use_karras_sigmas": True}, eta=0.0),
    "euler-sample": Case(EULER, X0, eta=0.0),
    "dpm++1": Case(DPM, {"solver_order": 1}, eta=0.0),
    "dpm++2m": Case(DPM, {}, eta=0.0),
    "dpm++2m-heun-v": Case(DPM, V | {"solver_type": "heun"}, eta=0.0),
    # Its rounded timesteps repeat themselves.
    "dpm++2m-karras": Case(DPM, {"use_karras_sigmas": True}, eta=0.0, steps=50),
    "dpm++2m-few": Case(DPM, TO_SIGMA_MIN, eta=0.0, steps=10),
    "dpm++2m-to-the-end": Case(DPM, TO_SIGMA_MIN, eta=0.0),
    "dpm++2m-euler-at-final": Case(DPM, TO_SIGMA_MIN | {"euler_at_final": True}, eta=0.0),
    "dpm++2m-flow": Case(DPM, FLOW_DPM, eta=0.0),
    "sde-dpm++1": Case(DPM, SDE | {"solver_order": 1}, eta=1.0),
    "sde-dpm++2m": Case(DPM, SDE, eta=1.0),
    "sde-dpm++2m-heun-sample": Case(DPM, SDE | X0 | {"solver_type": "heun"}, eta=1.0),
    "sde-dpm++2m-flow": Case(DPM, SDE | FLOW_DPM, eta=1.0),
    "flow": Case(FLOW, {"shift": 3.0}, eta=0.0),
    "flow-stochastic": Case(FLOW, {"shift": 3.0, "stochastic_sampling": True}, eta=1.0),
    "flow-sde": Case(FLOW_SDE, {"shift": 3.0}, eta=1.0),
}


class Double(Tensor):
    """A tensor that stays in double precision where a scheduler asks for single.

    What is left of the difference between two ways to step are then the formulas.
    """

    def to(self, *args, **kwargs):
        if torch.float32 in [*args, *kwargs.values()]:
            return self
        return super().to(*args, **kwargs)


def double_scheduler(kind: str):
    """A scheduler of diffusers with its constants in double precision, and its eta."""
    case = SAMPLERS[kind]
    noise_schedule = {} if case.scheduler in (FLOW, FLOW_SDE) else SD
    scheduler = case.scheduler(**noise_schedule, **case.settings)
    scheduler.set_timesteps(case.steps)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one", "sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler, case.eta


def random_samples(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 2, 4, 8, 8, generator=generator, dtype=torch.float64)


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A noisy sample, the reference's output and the anchor's."""
    x, out_reference, out_anchor = random_samples(3, torch.Generator().manual_seed(seed))
    return x, out_reference * 1.1, out_anchor * 0.9


def stepped(scheduler, eta: float, output: Tensor, t: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """x after a step of diffusers with this noise."""
    options = {"eta": eta} if isinstance(scheduler, DDIMScheduler) else {}
    randn_tensor = f"{type(scheduler).__module__}.randn_tensor"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randn_tensor, lambda *_, **__: noise, raising=eta > 0)
        result = scheduler.step(output.as_subclass(Double), t, x.as_subclass(Double), **options)
    return result.prev_sample.as_subclass(Tensor)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_chain_of_mixed_outputs_is_one_of_mixtures_of_both_transitions(kind, lam):
    """Both models see the mixed chain's sample and, in multistep samplers, its history."""
    scheduler, eta = double_scheduler(kind)
    start, _, _ = inputs(0)
    x = start * getattr(scheduler, "init_noise_sigma", 1)
    previous = None
    for i, t in enumerate(scheduler.timesteps):
        _, out_reference, out_anchor = inputs(i + 1)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype)

        # The mixture of both transitions.
        options = {"previous": previous, "index": i}
        reference = transition(scheduler, t, x, out_reference, eta, **options)
        anchor = transition(scheduler, t, x, out_anchor, eta, **options)
        mixture = geometric_mixture(reference, anchor, lam)
        closed = mixture.mean + mixture.variance.sqrt() * noise

        # A step of diffusers on the mixed output.
        mixed = (1 - lam) * out_reference + lam * out_anchor
        previous = data_prediction(scheduler, t, x, mixed, index=i)
        x = stepped(scheduler, eta, mixed, t, x, noise)
        assert x.dtype == torch.float64
        assert (x - closed).abs().max() <= 1e-12 * max(1, x.abs().max()), f"step {i}"


@pytest.mark.parametrize("kind", ["euler", "euler-ancestral", "ddim", "dpm++2m", "flow"])
def test_the_network_sees_what_the_scheduler_would_show_it(kind):
    scheduler, _ = double_scheduler(kind)
    x, _, _ = inputs(0)
    t = scheduler.timesteps[3]
    expected = x
    if hasattr(scheduler, "scale_model_input"):
        expected = scheduler.scale_model_input(x, t)
    torch.testing.assert_close(network_input(scheduler, t, x), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variances_mix_by_precision_and_not_by_output(variance_type, lam):
    """Each transition is diffusers' step; their mixture is Theorem 1, and not a mixed output."""
    scheduler = DDPM(**SD, **UNCLIPPED, variance_type=variance_type, steps_offset=1)
    scheduler.set_timesteps(10)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.one = scheduler.one.double()
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        # Outputs with a second half for the variance, from 0.1 to 0.9.
        x, *predictions = random_samples(3, generator)
        outputs = []
        for prediction in predictions:
            variance = torch.rand(x.shape, generator=generator, dtype=x.dtype) * 0.8 + 0.1
            outputs.append(torch.cat([prediction, variance], 1))
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)

        # Each model alone.
        models = [transition(scheduler, t, x, output) for output in outputs]
        for model, output in zip(models, outputs):
            expected = stepped(scheduler, 1.0, output, t, x, noise)
            assert (model.mean + model.variance.sqrt() * noise - expected).abs().max() <= 1e-12

        # Theorem 1 by hand.
        reference, anchor = models
        mixture = geometric_mixture(reference, anchor, lam)
        precision = (1 - lam) / reference.variance + lam / anchor.variance
        weighted_means = (1 - lam) * reference.mean / reference.variance
        weighted_means = weighted_means + lam * anchor.mean / anchor.variance
        mean = weighted_means / precision
        assert (mixture.mean - mean).abs().max() <= 1e-12 * mean.abs().max()
        assert (mixture.variance * precision - 1).abs().max() <= 1e-12

        # A step on the mixed output is another one, but for lam 0 and 1.
        mixed = stepped(scheduler, 1.0, torch.lerp(outputs[0], outputs[1], lam), t, x, noise)
        gap = (mixture.mean + mixture.variance.sqrt() * noise - mixed).abs().max()
        if lam in (0, 1):
            assert gap <= 1e-12
        else:
            assert gap > 1e-4


@pytest.mark.parametrize("kind", ["ddpm", "euler-ancestral", "sde-dpm++1", "flow-stochastic"])
def test_the_last_step_is_certain_and_the_others_are_not(kind):
    scheduler, eta = double_scheduler(kind)
    x, output, _ = inputs(0)
    variances = []
    for t in scheduler.timesteps:
        variances.append(transition(scheduler, t, x, output, eta).variance.item())
    assert variances[-1] == 0
    assert all(variance > 0 for variance in variances[:-1])


def test_euler_ancestral_and_first_order_sde_dpm_are_the_same_step():
    """Between the same noise levels they are equal in x / alpha."""
    ancestral, _ = double_scheduler("euler-ancestral")
    solver = DPM(**SD, **SDE, solver_order=1)
    solver.set_timesteps(20)
    solver.sigmas = ancestral.sigmas
    solver.timesteps = ancestral.timesteps
    x, eps, _ = inputs(0)
    for t in ancestral.timesteps:
        step = step_at(solver, t)
        by_ancestral = transition(ancestral, t, x, eps)
        by_solver = transition(solver, t, x * step.alpha, eps)
        torch.testing.assert_close(by_solver.mean / step.alpha_next, by_ancestral.mean)
        torch.testing.assert_close(by_solver.variance / step.alpha_next**2, by_ancestral.variance)


def test_flow_sde_at_noise_level_0_is_the_ode_with_the_flows_config():
    ode = FLOW(shift=3.0)
    sde = FLOW_SDE.from_config(ode.config, noise_level=0.0)
    assert sde.config.shift == 3.0
    assert sde.config.noise_level == 0
    ode.set_timesteps(5)
    sde.set_timesteps(5)
    x, v = torch.randn(2, 2, 4, 8, 8)
    for t in ode.timesteps:
        torch.testing.assert_close(sde.step(v, t, x).prev_sample, ode.step(v, t, x).prev_sample)
    with pytest.raises(ValueError, match="noise_level must be 0"):
        FLOW_SDE(noise_level=-1)


def test_flow_sde_keeps_the_flows_marginals():
    """Data N(0, 1/4) keep their variance over many steps, up to one last noisy step."""
    scheduler = FLOW_SDE(noise_level=0.7)
    scheduler.set_timesteps(1000)
    variance = 1.0
    for i, t in enumerate(scheduler.timesteps):
        # The exact velocity: v = (t - (1 - t) / 4) / (t^2 + (1 - t)^2 / 4) x.
        time = scheduler.sigmas[i].double()
        slope = (time - (1 - time) / 4) / (time**2 + (1 - time) ** 2 / 4)
        x = torch.ones(1, 1, dtype=torch.float64)
        step = transition(scheduler, t, x, slope.view(1, 1), index=i)
        variance = step.mean.item() ** 2 * variance + step.variance.item()
    assert variance == pytest.approx(0.25, rel=0.02)


REFUSED = [
    (PNDMScheduler(), "PNDMScheduler's step here: use DDIM, DDPM, Euler"),
    (DDPM(), "clip_sample=True: set clip_sample=False"),
    (DDIM(clip_sample=False, thresholding=True), "thresholding=True: set"),
    (
        DDPM(clip_sample=False, variance_type="fixed_large_log"),
        "variance_type='fixed_large_log': use one of fixed_small",
    ),
    (DPM(variance_type="learned"), "variance_type='learned': use None"),
    (
        DPM(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
        "algorithm_type='dpmsolver': use 'dpmsolver[+][+]' or",
    ),
    (DPM(solver_order=3), "solver_order=3: use 1 or 2"),
    (
        DPM(prediction_type="flow_prediction"),
        "use_flow_sigmas=False: use it with prediction_type='flow_prediction'",
    ),
    (FLOW(invert_sigmas=True), "invert_sigmas=True: set"),
]
REFUSED_NAMES = [message.split(":")[0] for _, message in REFUSED]


@pytest.mark.parametrize(("scheduler", "message"), REFUSED, ids=REFUSED_NAMES)
def test_what_has_no_closed_form_is_refused(scheduler, message):
    scheduler.set_timesteps(4)
    x, output, _ = inputs(0)
    with pytest.raises(ValueError, match=f"no closed form of .*{message}"):
        transition(scheduler, scheduler.timesteps[0], x, output)


def test_a_timestep_that_appears_twice_needs_its_index():
    x, output, _ = inputs(0)
    scheduler, _ = double_scheduler("dpm++2m-karras")
    repeated = [t for t in scheduler.timesteps if (scheduler.timesteps == t).sum() > 1]
    message = r"appears \d times in scheduler.timesteps: pass its index"
    with pytest.raises(ValueError, match=message):
        transition(scheduler, repeated[0], x, output)


def test_a_learned_variance_that_the_network_does_not_output_is_refused():
    x, output, _ = inputs(0)
    scheduler = DDPM(clip_sample=False, variance_type="learned_range")
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="twice the sample's channels"):
        transition(scheduler, scheduler.timesteps[0], x, output)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_kl_factors_are_half_the_gain_of_log_snr_by_the_squared_eps(kind):
    """From the definitions: what eps two outputs at one x stand for, and how the noise falls."""
    scheduler, _ = double_scheduler(kind)
    factors = kl_factors(scheduler)
    steps = [step_at(scheduler, t, i) for i, t in enumerate(scheduler.timesteps)]
    assert factors.shape == (len(steps),)
    assert factors.dtype == torch.float64
    x, output, other = inputs(1)
    for i, (t, step) in enumerate(zip(scheduler.timesteps, steps)):
        is_last = i + 1 == len(steps)
        if "flow" in kind and not is_last:
            # The integral over the step, not the value at its beginning.
            grid = torch.linspace(steps[i + 1].sigma, step.sigma, 20_001, dtype=torch.float64)
            integral = torch.trapezoid((1 - grid) / grid, grid).item()
            assert factors[i].item() == pytest.approx(integral, rel=1e-5)
        elif step.alpha == 0:
            # Pure noise: the outputs say nothing of the data.
            assert factors[i] == 0
        else:
            # x is the same for both, so that sigma D_eps = -alpha D_x0.
            x0 = data_prediction(scheduler, t, x, output, index=i)
            other_x0 = data_prediction(scheduler, t, x, other, index=i)
            squared_eps = ((other_x0 - x0) * step.alpha / step.sigma).square().sum()
            gain = 1 if is_last else log_snr(steps[i + 1]) - log_snr(step)
            expected = (0.5 * gain * squared_eps).item()
            divergence = (factors[i] * (other - output).square().sum()).item()
            assert divergence == pytest.approx(expected, rel=1e-9)


def log_snr(step) -> Tensor:
    """ln of the signal-to-noise ratio before a step."""
    return 2 * (step.alpha / step.sigma).log()


def test_kl_factors_of_a_scheduler_without_a_closed_form():
    scheduler = PNDMScheduler(**SD, skip_prk_steps=True)
    scheduler.set_timesteps(10)
    bars = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    snr = bars / (1 - bars)
    factors = kl_factors(scheduler)
    assert factors[:-1].sum().item() == pytest.approx(0.5 * math.log(snr[-1] / snr[0]))
    assert factors[-1] == 0.5


def test_kl_factors_of_stable_cascade_are_those_of_the_steps_that_it_takes():
    """A DDPM step's exact KL is 1/2 (SNR_n / SNR - 1) |D|^2, measured here on the steps."""
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(20)
    factors = kl_factors(scheduler)
    assert factors.shape == (20,)
    assert factors[-1] == 0.5  # by convention, as that of all schedulers

    x, output, other = inputs(1)
    squared_difference = (other - output).square().sum()
    for i, t in enumerate(scheduler.timesteps[:-2]):
        time = t.expand(len(x))

        def take_step(prediction, seed, time=time):
            generator = torch.Generator().manual_seed(seed)
            return scheduler.step(prediction, time, x, generator).prev_sample

        # The same noise leaves the means' distance, and other noise tells its deviation.
        apart = take_step(other, 0) - take_step(output, 0)
        noises = []
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            noises.append(torch.randn(x.shape, generator=generator, dtype=x.dtype))
        spread = (take_step(output, 0) - take_step(output, 1)) / (noises[0] - noises[1])
        divergence = apart.square().sum() / (2 * spread.median() ** 2)

        # 1/2 ln(SNR_n / SNR), by the divergence of the step.
        expected = 0.5 * torch.log1p(2 * divergence / squared_difference)
        assert factors[i].item() == pytest.approx(expected.item(), rel=1e-5)


def test_kl_factors_need_a_known_prediction_type_and_a_known_ratio():
    scheduler = PNDMScheduler(**SD, skip_prk_steps=True)
    scheduler.set_timesteps(10)
    scheduler.register_to_config(prediction_type="noise")
    with pytest.raises(ValueError, match="prediction_type='noise' is not known"):
        kl_factors(scheduler)
    del scheduler.alphas_cumprod
    scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(ValueError, match="has no alphas_cumprod"):
        kl_factors(scheduler)
