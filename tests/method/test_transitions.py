"""Our transitions against diffusers' own steps, and the paper's claim that mixing outputs is mixing
posteriors."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
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
V, X0, SDE = (
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"algorithm_type": "sde-dpmsolver++"},
)
PLAIN = {"clip_sample": False}
FLOW_DPM = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
DPM, FLOW = DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
SAMPLERS = {  # scheduler, its settings, eta, steps
    "ddim": (DDIMScheduler, PLAIN | {"set_alpha_to_one": False, "steps_offset": 1}, 0.0, 20),
    "ddim-eta": (DDIMScheduler, PLAIN, 0.6, 20),
    "ddim-trailing": (DDIMScheduler, PLAIN | {"timestep_spacing": "trailing"}, 1.0, 20),
    "ddim-v-zero-snr": (
        DDIMScheduler,
        PLAIN | V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        0.3,
        20,
    ),
    "ddim-sample": (DDIMScheduler, PLAIN | X0, 0.3, 20),
    "ddpm": (DDPMScheduler, PLAIN, 1.0, 20),
    "ddpm-large-v": (
        DDPMScheduler,
        PLAIN | V | {"variance_type": "fixed_large", "steps_offset": 1},
        1.0,
        20,
    ),
    "ddpm-log-sample": (DDPMScheduler, PLAIN | X0 | {"variance_type": "fixed_small_log"}, 1.0, 20),
    "euler-ancestral": (
        EulerAncestralDiscreteScheduler,
        {"timestep_spacing": "leading", "steps_offset": 1},
        1.0,
        20,
    ),
    "euler-ancestral-v": (EulerAncestralDiscreteScheduler, V, 1.0, 20),
    "euler": (EulerDiscreteScheduler, {}, 0.0, 20),
    "euler-karras-v": (
        EulerDiscreteScheduler,
        V | {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        0.0,
        20,
    ),
    "euler-sample": (EulerDiscreteScheduler, X0, 0.0, 20),
    "dpm++1": (DPM, {"solver_order": 1}, 0.0, 20),
    "dpm++2m": (DPM, {}, 0.0, 20),
    "dpm++2m-heun-v": (DPM, V | {"solver_type": "heun"}, 0.0, 20),
    "dpm++2m-karras": (
        DPM,
        {"use_karras_sigmas": True},
        0.0,
        50,
    ),  # its rounded timesteps repeat themselves
    "dpm++2m-few": (DPM, {"final_sigmas_type": "sigma_min"}, 0.0, 10),
    "dpm++2m-to-the-end": (DPM, {"final_sigmas_type": "sigma_min"}, 0.0, 20),
    "dpm++2m-euler-at-final": (
        DPM,
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        0.0,
        20,
    ),
    "dpm++2m-flow": (DPM, FLOW_DPM, 0.0, 20),
    "sde-dpm++1": (DPM, SDE | {"solver_order": 1}, 1.0, 20),
    "sde-dpm++2m": (DPM, SDE, 1.0, 20),
    "sde-dpm++2m-heun-sample": (DPM, SDE | X0 | {"solver_type": "heun"}, 1.0, 20),
    "sde-dpm++2m-flow": (DPM, SDE | FLOW_DPM, 1.0, 20),
    "flow": (FLOW, {"shift": 3.0}, 0.0, 20),
    "flow-stochastic": (FLOW, {"shift": 3.0, "stochastic_sampling": True}, 1.0, 20),
    "flow-sde": (FlowMatchSDEScheduler, {"shift": 3.0}, 1.0, 20),
}


class Double(Tensor):
    """A tensor in double precision whom nobody brings to single, as several schedulers want it:
    what is left are the formulas."""

    def to(self, *args, **kwargs):
        wanted = [*args, *kwargs.values()]
        return self if torch.float32 in wanted else super().to(*args, **kwargs)


def double_scheduler(kind: str):
    """A diffusers scheduler whose constants are in double precision, as its steps then are; and
    eta."""
    cls, settings, eta, steps = SAMPLERS[kind]
    scheduler = cls(**({} if cls in (FLOW, FlowMatchSDEScheduler) else SD), **settings)
    scheduler.set_timesteps(steps)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one", "sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler, eta


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x and two outputs in double precision."""
    x, out_reference, out_anchor = torch.randn(
        3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return x, out_reference * 1.1, out_anchor * 0.9


def stepped(scheduler, eta: float, output: Tensor, t: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """x one step on, as diffusers steps, with that noise."""
    options = {"eta": eta} if isinstance(scheduler, DDIMScheduler) else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            f"{type(scheduler).__module__}.randn_tensor", lambda *_, **__: noise, raising=eta > 0
        )
        return scheduler.step(
            output.as_subclass(Double), t, x.as_subclass(Double), **options
        ).prev_sample.as_subclass(Tensor)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_chain_of_mixed_outputs_is_one_of_mixtures_of_both_transitions(kind, lam):
    """Over the whole chain; both models see the mixed chain's sample and, in multistep samplers,
    its history."""
    scheduler, eta = double_scheduler(kind)
    start, _, _ = inputs(0)
    x = start * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else start
    previous = None
    for i, t in enumerate(scheduler.timesteps):
        _, out_reference, out_anchor = inputs(i + 1)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype)
        both = [
            transition(scheduler, t, x, out, eta, previous=previous, index=i)
            for out in (out_reference, out_anchor)
        ]
        mixture = geometric_mixture(*both, lam)
        mixed = (1 - lam) * out_reference + lam * out_anchor
        closed = mixture.mean + mixture.variance.sqrt() * noise
        previous = data_prediction(scheduler, t, x, mixed, index=i)
        x = stepped(scheduler, eta, mixed, t, x, noise)
        assert x.dtype == torch.float64
        assert (x - closed).abs().max() <= 1e-12 * max(1, x.abs().max()), f"step {i}"


@pytest.mark.parametrize("kind", ["euler", "euler-ancestral", "ddim", "dpm++2m", "flow"])
def test_the_network_sees_what_the_scheduler_would_show_it(kind):
    scheduler, _ = double_scheduler(kind)
    x = inputs(0)[0]
    shown = (
        scheduler.scale_model_input(x, scheduler.timesteps[3])
        if hasattr(scheduler, "scale_model_input")
        else x
    )
    torch.testing.assert_close(
        network_input(scheduler, scheduler.timesteps[3], x), shown, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variances_mix_by_precision_and_not_by_output(variance_type, lam):
    """Each model's transition is diffusers' step; their mixture is Theorem 1, which a step on mixed
    outputs misses."""
    scheduler = DDPMScheduler(**SD, clip_sample=False, variance_type=variance_type, steps_offset=1)
    scheduler.set_timesteps(10)
    scheduler.alphas_cumprod, scheduler.one = (
        scheduler.alphas_cumprod.double(),
        scheduler.one.double(),
    )
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        x, *outputs = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
        outputs = [
            torch.cat([out, torch.rand(x.shape, generator=generator, dtype=x.dtype) * 0.8 + 0.1], 1)
            for out in outputs
        ]
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        models = [transition(scheduler, t, x, out) for out in outputs]
        for model, out in zip(models, outputs):
            expected = stepped(scheduler, 1.0, out, t, x, noise)
            assert (model.mean + model.variance.sqrt() * noise - expected).abs().max() <= 1e-12
        mixture = geometric_mixture(*models, lam)
        precision = (1 - lam) / models[0].variance + lam / models[1].variance
        mean = (
            (1 - lam) * models[0].mean / models[0].variance
            + lam * models[1].mean / models[1].variance
        ) / precision
        assert (mixture.mean - mean).abs().max() <= 1e-12 * mean.abs().max()
        assert (mixture.variance * precision - 1).abs().max() <= 1e-12
        mixed = stepped(scheduler, 1.0, torch.lerp(outputs[0], outputs[1], lam), t, x, noise)
        gap = (mixture.mean + mixture.variance.sqrt() * noise - mixed).abs().max()
        assert gap <= 1e-12 if lam in (0, 1) else gap > 1e-4


def test_the_last_step_is_certain_and_noise_shrinks_before():
    for kind in ("ddpm", "euler-ancestral", "sde-dpm++1", "flow-stochastic"):
        scheduler, eta = double_scheduler(kind)
        x, output, _ = inputs(0)
        variances = [
            transition(scheduler, t, x, output, eta).variance.item() for t in scheduler.timesteps
        ]
        assert variances[-1] == 0 and all(v > 0 for v in variances[:-1])


def test_ancestral_samplers_are_one_step_in_two_clothes():
    """Euler ancestral and first-order SDE-DPM++ between the same noise levels: equal in x /
    alpha."""
    ancestral, _ = double_scheduler("euler-ancestral")
    solver = DPM(**SD, **SDE, solver_order=1)
    solver.set_timesteps(20)
    solver.sigmas, solver.timesteps = ancestral.sigmas, ancestral.timesteps
    x, eps, _ = inputs(0)
    for t in ancestral.timesteps:
        step = step_at(solver, t)
        a, b = transition(ancestral, t, x, eps), transition(solver, t, x * step.alpha, eps)
        torch.testing.assert_close(b.mean / step.alpha_next, a.mean)
        torch.testing.assert_close(b.variance / step.alpha_next**2, a.variance)


def test_flow_sde_keeps_the_flows_config_and_marginals():
    """noise_level 0 is the ODE; otherwise Gaussian data keep their variance over many steps, ending
    one last noisy step away."""
    ode = FLOW(shift=3.0)
    sde = FlowMatchSDEScheduler.from_config(ode.config, noise_level=0.0)
    assert sde.config.shift == 3.0 and sde.config.noise_level == 0
    for scheduler in (ode, sde):
        scheduler.set_timesteps(5)
    x, v = torch.randn(2, 2, 4, 8, 8)
    for t in ode.timesteps:
        torch.testing.assert_close(sde.step(v, t, x).prev_sample, ode.step(v, t, x).prev_sample)
    scheduler, variance = FlowMatchSDEScheduler(noise_level=0.7), 1.0
    scheduler.set_timesteps(1000)
    for i, t in enumerate(
        scheduler.timesteps
    ):  # data N(0, 1/4): v = (t - (1-t)/4) / (t^2 + (1-t)^2/4) x
        s = scheduler.sigmas[i].double()
        slope = (s - (1 - s) / 4) / (s**2 + (1 - s) ** 2 / 4)
        step = transition(
            scheduler, t, torch.ones(1, 1, dtype=torch.float64), slope.view(1, 1), index=i
        )
        variance = step.mean.item() ** 2 * variance + step.variance.item()
    assert variance == pytest.approx(0.25, rel=0.02)
    with pytest.raises(ValueError, match="noise_level must be 0"):
        FlowMatchSDEScheduler(noise_level=-1)


REFUSED = [
    (PNDMScheduler(), "PNDMScheduler's step here: use DDIM, DDPM, Euler"),
    (DDPMScheduler(), "clip_sample=True: set clip_sample=False"),
    (DDIMScheduler(clip_sample=False, thresholding=True), "thresholding=True: set"),
    (
        DDPMScheduler(clip_sample=False, variance_type="fixed_large_log"),
        "variance_type='fixed_large_log': use one of fixed_small",
    ),
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


@pytest.mark.parametrize(
    ("scheduler", "said"), REFUSED, ids=[said.split(":")[0] for _, said in REFUSED]
)
def test_what_has_no_closed_form_is_refused(scheduler, said):
    scheduler.set_timesteps(4)
    x, output, _ = inputs(0)
    with pytest.raises(ValueError, match=f"no closed form of .*{said}"):
        transition(scheduler, scheduler.timesteps[0], x, output)


def test_a_timestep_that_stands_twice_and_a_variance_that_is_not_there_are_refused():
    x, output, _ = inputs(0)
    scheduler, _ = double_scheduler("dpm++2m-karras")
    (twice,) = [t for t in scheduler.timesteps if (scheduler.timesteps == t).sum() > 1][:1]
    with pytest.raises(
        ValueError, match=r"appears \d times in scheduler.timesteps: pass its index"
    ):
        transition(scheduler, twice, x, output)
    learned = DDPMScheduler(clip_sample=False, variance_type="learned_range")
    learned.set_timesteps(4)
    with pytest.raises(ValueError, match="twice the sample's channels"):
        transition(learned, learned.timesteps[0], x, output)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_kl_factors_are_half_the_gain_of_log_snr_by_the_squared_eps(kind):
    """From the definitions: two outputs on one x, what eps each stands for, and how the noise falls
    from step to step."""
    scheduler, _ = double_scheduler(kind)
    factors, steps = (
        kl_factors(scheduler),
        [step_at(scheduler, t, i) for i, t in enumerate(scheduler.timesteps)],
    )
    assert factors.shape == (len(steps),) and factors.dtype == torch.float64
    x, out, other = inputs(1)
    for i, (t, step) in enumerate(zip(scheduler.timesteps, steps)):
        if "flow" in kind and i + 1 < len(steps):  # the integral over the step, not its beginning
            s, s_next = step.sigma.item(), steps[i + 1].sigma.item()
            grid = torch.linspace(s_next, s, 20_001, dtype=torch.float64)
            assert factors[i].item() == pytest.approx(
                torch.trapezoid((1 - grid) / grid, grid).item(), rel=1e-5
            )
        elif step.alpha == 0:  # pure noise: nothing is known of the data, and nothing is paid
            assert factors[i] == 0
        else:
            x0 = [data_prediction(scheduler, t, x, o, index=i) for o in (out, other)]
            squared_eps = (
                ((x0[1] - x0[0]) * step.alpha / step.sigma).square().sum()
            )  # x - alpha x0 = sigma eps
            gain = (
                2 * (step.alpha / step.sigma * steps[i + 1].sigma / steps[i + 1].alpha).log().neg()
                if i + 1 < len(steps)
                else 1
            )
            assert (factors[i] * (other - out).square().sum()).item() == pytest.approx(
                (0.5 * gain * squared_eps).item(), rel=1e-9
            )


def test_kl_factors_of_schedulers_without_a_transition_and_without_a_ratio():
    scheduler = PNDMScheduler(**SD, skip_prk_steps=True)
    scheduler.set_timesteps(10)
    bars = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    factors = kl_factors(scheduler)
    snr = bars / (1 - bars)
    assert (
        factors[:-1].sum().item() == pytest.approx(0.5 * math.log(snr[-1] / snr[0]))
        and factors[-1] == 0.5
    )
    scheduler.register_to_config(prediction_type="noise")
    with pytest.raises(ValueError, match="prediction_type='noise' is not known"):
        kl_factors(scheduler)
    del scheduler.alphas_cumprod
    scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(ValueError, match="has no alphas_cumprod"):
        kl_factors(scheduler)
