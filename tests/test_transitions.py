"""Our transitions against diffusers' own steps, and the paper's claim that mixing outputs is mixing posteriors."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from deradiff.gaussian import geometric_mixture
from deradiff.transitions import alpha_bars, log_snr_steps, squared_eps_per_output, transition

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAMPLERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, 0.0),
    "ddim-eta": (DDIMScheduler, {"clip_sample": False}, 0.6),
    "ddim-trailing": (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}, 1.0),
    "ddpm": (DDPMScheduler, {"clip_sample": False}, 1.0),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}, 1.0),
}


def double_scheduler(kind: str, steps: int = 20):
    """A diffusers scheduler whose constants are in double precision, as its steps then are; and eta."""
    cls, settings, eta = SAMPLERS[kind]
    scheduler = cls(**SD, **settings)
    scheduler.set_timesteps(steps)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one", "sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler, eta


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x and two outputs in double precision; x is exact in single precision, to which Euler ancestral casts it."""
    generator = torch.Generator().manual_seed(seed)
    x, eps_reference, eps_anchor = torch.randn(3, 2, 4, 8, 8, generator=generator)
    return x.double(), eps_reference.double() * 1.1, eps_anchor.double() * 0.9


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_one_step_on_mixed_outputs_is_the_mixture_of_both_transitions(kind, lam):
    scheduler, eta = double_scheduler(kind)
    for i, t in enumerate(scheduler.timesteps):
        x, eps_reference, eps_anchor = inputs(i)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype)
        mixture = geometric_mixture(transition(scheduler, t, x, eps_reference, eta), transition(scheduler, t, x, eps_anchor, eta), lam)
        mixed = (1 - lam) * eps_reference + lam * eps_anchor
        scheduler.scale_model_input(x, t)
        options = {"eta": eta} if kind.startswith("ddim") else {}
        stepped = scheduler.step(mixed, t, x, generator=torch.Generator().manual_seed(i), **options).prev_sample
        assert stepped.dtype == torch.float64
        assert (stepped - (mixture.mean + mixture.variance.sqrt() * noise)).abs().max() <= 1e-12


def test_the_last_step_is_certain_and_noise_shrinks_before():
    for kind in ("ddpm", "euler-ancestral"):
        scheduler, eta = double_scheduler(kind)
        x, eps, _ = inputs(0)
        variances = [transition(scheduler, t, x, eps, eta).variance.item() for t in scheduler.timesteps]
        assert variances[-1] == 0 and all(v > 0 for v in variances[:-1])


def test_a_scheduler_without_a_closed_form_here_is_refused():
    x, eps, _ = inputs(0)
    for scheduler in (DPMSolverMultistepScheduler(), DDPMScheduler(variance_type="learned_range")):
        scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match=r"no closed form of .*use DDIM, DDPM"):
            transition(scheduler, scheduler.timesteps[0], x, eps)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_log_snr_steps_add_up_to_the_whole_way(kind):
    scheduler, _ = double_scheduler(kind)
    steps, bars = log_snr_steps(scheduler), alpha_bars(scheduler)
    at = scheduler.alphas_cumprod[scheduler.timesteps.round().long()]
    torch.testing.assert_close(bars, at, rtol=1e-5, atol=0)
    assert steps.shape == (20,) and (steps > 0).all() and steps[-1] == 1
    snr = at / (1 - at)
    assert steps[:-1].sum().item() == pytest.approx((snr[-1] / snr[0]).log().item(), rel=1e-4)


def test_log_snr_needs_alpha_bars():
    with pytest.raises(ValueError, match="has no alphas_cumprod"):
        log_snr_steps(FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_squared_eps_is_the_same_whatever_the_network_predicts(prediction):
    scheduler = DDIMScheduler(**SD, prediction_type=prediction)
    scheduler.set_timesteps(5)
    x, eps, other = inputs(1)
    for t, bar, gain in zip(scheduler.timesteps, alpha_bars(scheduler), squared_eps_per_output(scheduler)):
        x0 = [(x - (1 - bar).sqrt() * e) / bar.sqrt() for e in (eps, other)]
        output = {
            "epsilon": [eps, other],
            "sample": x0,
            "v_prediction": [bar.sqrt() * e - (1 - bar).sqrt() * z for e, z in zip((eps, other), x0)],
        }[prediction]
        squared = (output[0] - output[1]).square().sum()
        torch.testing.assert_close(gain * squared, (eps - other).square().sum(), msg=f"{prediction} at {t}")
