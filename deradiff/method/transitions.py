"""One reverse step of a diffusers scheduler as the Gaussian that it draws from, and how much
signal-to-noise each step gains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deradiff.method.gaussian import Gaussian
from deradiff.method.steps import EULER, FLOW, Step, prediction_type, step_at


def transition(
    scheduler: Any,
    timestep: Tensor,
    x: Tensor,
    output: Tensor,
    eta: float = 0.0,
    *,
    previous: Tensor | None = None,
    index: int | None = None,
) -> Gaussian:
    """p(x_next | x) of one step, as `scheduler.step` takes it, for a network's output (epsilon,
    v_prediction, sample or flow).

    x: (B, C, ...), the sample as the scheduler keeps it; output: the same shape, or (B, 2C, ...)
        where DDPM's variance is learned;
    timestep: one of `scheduler.timesteps`; index: its place there, needed only where it stands
        there twice. eta: DDIM's (Song et al. 2021, Eq. 16); the others have their own. previous:
        the data prediction of the step before (`data_prediction`), which second-order DPM++
    uses: a realigned chain has one history, that of the mixed output. None: there was no step
        before.

    Every sampler's marginals are x = alpha x0 + sigma eps, and with x0 and eps as the output
    predicts them its step draws from
        mean = alpha_n x0 + sqrt(sigma_n^2 - std^2) eps,    std = eta sigma_n sqrt(1 - (sigma_n
        alpha / (sigma alpha_n))^2):
    DDPM, Euler ancestral and SDE-DPM++ have eta = 1 in this, Euler, DPM++ and the flow ODE eta = 0;
    stochastic flow has std = sigma_n. DPM++ 2M and SDE-2M (Lu et al. 2022, "DPM-Solver++") add a
    multiple of x0 - previous; the SDE of Flow-GRPO (Liu et al. 2025, Eq. 9) is an Euler-Maruyama
    step, whose factor of eps is sigma_n - std^2 / (2 sigma).

    Raises ValueError for a scheduler or an option of its config without such a form; clipping and
    thresholding are among these.
    """
    step = step_at(scheduler, timestep, index)
    channels = x.shape[1]
    x0, eps = _predictions(scheduler, step, x, output[:, :channels])
    std = _std(scheduler, step, eta)
    towards = (step.sigma_next**2 - std**2).sqrt()
    if type(scheduler).__name__ == "FlowMatchSDEScheduler":
        towards = step.sigma_next - std**2 / (2 * step.sigma)
    mean = step.alpha_next * x0 + towards * eps
    if (
        type(scheduler).__name__ == "DPMSolverMultistepScheduler"
        and previous is not None
        and _second_order(scheduler, step)
    ):
        mean = mean + _curvature(scheduler, step) * (x0 - previous)
    if type(scheduler).__name__ == "DDPMScheduler":
        return Gaussian(mean, _ddpm_variance(scheduler, step, output[:, channels:]).to(x))
    return Gaussian(mean, (std**2).to(x))


def data_prediction(
    scheduler: Any, timestep: Tensor, x: Tensor, output: Tensor, *, index: int | None = None
) -> Tensor:
    """x0 (B, C, ...) as the output predicts it; see `transition`."""
    return _predictions(scheduler, step_at(scheduler, timestep, index), x, output[:, : x.shape[1]])[
        0
    ]


def network_input(
    scheduler: Any, timestep: Tensor, x: Tensor, *, index: int | None = None
) -> Tensor:
    """x (B, ...) as the network expects it: `scheduler.scale_model_input`, without the count of
    steps that it keeps."""
    if type(scheduler).__name__ not in EULER:
        return x
    return x * (1 + step_at(scheduler, timestep, index).sigma ** 2).rsqrt()


def kl_factors(scheduler: Any) -> Tensor:
    """c of each step, (steps,) in double precision on the CPU: 1/2 L |D_eps|^2 = c |D|^2 for
    differences D of two models' outputs.

    L = ln(SNR_next / SNR), read from `scheduler.sigmas` where it has them; the last step, which
    ends where the ratio is infinite, counts 1. |D_eps|^2 is |D|^2, alpha_bar |D|^2 and SNR |D|^2
    for epsilon, v_prediction and sample. Flow
    matching: c = ln(t / t_n) - (t - t_n), the integral of (1 - t) / t over the step at a constant
    D, and (1 - t)^2 / 2 at the last. For any scheduler, also without a `transition`. Raises
    ValueError for schedulers without alphas_cumprod or flow times, and for an unknown prediction
    type.
    """
    if prediction_type(scheduler) == "flow":
        t, t_next = scheduler.sigmas[:-1].double().cpu(), scheduler.sigmas[1:].double().cpu()
        return torch.cat([((t / t_next).log() - (t - t_next))[:-1], ((1 - t[-1:]) ** 2) / 2])
    bars = _alpha_bars(scheduler)
    snr = bars / (1 - bars)
    gains = torch.cat([snr.log().diff(), torch.ones(1, dtype=snr.dtype)])
    squared_eps = {"epsilon": torch.ones_like(bars), "v_prediction": bars, "sample": snr}[
        prediction_type(scheduler)
    ]
    return (0.5 * gains * squared_eps).nan_to_num(
        nan=0.0, posinf=torch.inf
    )  # alpha_bar L -> 0 from pure noise


def _alpha_bars(scheduler: Any) -> Tensor:
    """alpha_bar at each of `scheduler.timesteps`."""
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod, so that its steps' "
            f"signal-to-noise ratio is not known"
        )
    if hasattr(
        scheduler, "sigmas"
    ):  # noise over signal, also between the training timesteps (Karras)
        return 1 / (1 + scheduler.sigmas[: len(scheduler.timesteps)].double().cpu() ** 2)
    return scheduler.alphas_cumprod.double().cpu()[scheduler.timesteps.long().cpu()]


def _predictions(scheduler: Any, step: Step, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """x0 and eps with x = alpha x0 + sigma eps, as the network's output has them."""
    alpha, sigma = step.alpha, step.sigma
    kind = prediction_type(scheduler)
    if kind == "flow":  # the output is eps - x0
        return x - sigma * output, x + alpha * output
    if kind == "v_prediction":  # of x at unit variance: alpha eps - sigma x0
        norm = (alpha**2 + sigma**2).sqrt()
        alpha, sigma, x = alpha / norm, sigma / norm, x / norm
        return alpha * x - sigma * output, sigma * x + alpha * output
    if kind == "sample":
        return output, (x - alpha * output) / sigma
    return (x - sigma * output) / alpha, output


def _std(scheduler: Any, step: Step, eta: float) -> Tensor:
    """The step's own noise, apart from DDPM's variance types, which leave the mean alone."""
    kind, config = type(scheduler).__name__, scheduler.config
    if kind == "FlowMatchSDEScheduler":
        return scheduler.noise_std(step.index).double()
    if kind in FLOW:
        return step.sigma_next * config.stochastic_sampling
    if kind == "EulerDiscreteScheduler" or config.get("algorithm_type") == "dpmsolver++":
        eta = 0.0
    elif kind != "DDIMScheduler":
        eta = 1.0
    return eta * step.sigma_next * (1 - step.noise_ratio**2).sqrt()


def _ddpm_variance(scheduler: Any, step: Step, predicted: Tensor) -> Tensor:
    """DDPM's variance (Ho et al. 2020; learned: Nichol and Dhariwal 2021, Eq. 15), with diffusers'
    floor."""
    kind = scheduler.config.variance_type
    if step.time == 0:
        return torch.zeros(())
    if kind.startswith("learned") and not predicted.numel():
        raise ValueError(
            f"variance_type={kind!r} needs a network of twice the sample's channels: use "
            f"variance_type='fixed_small'"
        )
    large = 1 - (step.alpha / step.alpha_next) ** 2
    small = ((step.sigma_next / step.sigma) ** 2 * large).clamp(min=1e-20)
    if kind == "learned":
        return predicted
    if kind == "learned_range":
        share = (predicted + 1) / 2
        return (share * large.log() + (1 - share) * small.log()).exp()
    return large if kind == "fixed_large" else small


def _second_order(scheduler: Any, step: Step) -> bool:
    """Whether DPM++ uses its history here: not where it ends with a first-order step."""
    config, steps = scheduler.config, len(scheduler.timesteps)
    last = step.index == steps - 1
    return config.solver_order == 2 and not (
        last
        and (
            config.euler_at_final
            or config.final_sigmas_type == "zero"
            or (config.lower_order_final and steps < 15)
        )
    )


def _curvature(scheduler: Any, step: Step) -> Tensor:
    """The factor of x0 - previous in a second-order step of DPM++; h is the gain of ln(alpha /
    sigma), doubled in the SDE's formulas."""
    before = step_at(scheduler, scheduler.timesteps[step.index - 1], step.index - 1)
    h, h_before = -step.noise_ratio.log(), -before.noise_ratio.log()
    gain = h * (2 if scheduler.config.algorithm_type == "sde-dpmsolver++" else 1)
    factor = (
        -torch.expm1(-gain) / 2
        if scheduler.config.solver_type == "midpoint"
        else 1 + torch.expm1(-gain) / gain
    )
    return step.alpha_next * factor * h / h_before
