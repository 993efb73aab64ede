"""One reverse step of each sampler, as the Gaussian that it draws from.

Noisy samples are x = alpha x0 + sigma eps. A network's output at x predicts x0 and eps. A step goes
from the noise level (alpha, sigma) to (alpha_n, sigma_n), and every sampler draws from

    x_n = alpha_n x0 + sqrt(sigma_n^2 - std^2) eps + std noise

(Song et al. 2021, "Denoising Diffusion Implicit Models", Eq. 12). The factors keep the marginals:
x_n has the noise sigma_n, for any std. What a sampler chooses is std. It is 0 for Euler, DPM++ and
the flow ODE. It is the ancestral one for DDPM, Euler ancestral and SDE-DPM++:

    std = sigma_n sqrt(1 - (sigma_n alpha / (sigma alpha_n))^2)

Second-order DPM++ and the SDE of flow matching add a term of their own.

`transition` reads what a scheduler of diffusers does. The functions below it are the samplers.

Shapes: x, x0, eps and differences D (B, C, ...), a batch of B samples; an output is the same, or
(B, 2C, ...) where DDPM's variance is learned. Noise levels and std are numbers () in double
precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deradiff.method.gaussian import Gaussian
from deradiff.method.steps import EULER, WUERSTCHEN, Step, prediction_type, step_at


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
    """p(x_n | x): what `scheduler.step` draws from, for a network's output.

    Args:
        scheduler: a diffusers scheduler, after `set_timesteps`.
        timestep: one of `scheduler.timesteps`.
        x: the noisy sample as the scheduler keeps it (B, C, ...).
        output: the network's output (B, C, ...), or (B, 2C, ...) where the variance is learned.
        eta: of DDIM; the other samplers have none.
        previous: the x0 of the step before (`data_prediction`), for second-order DPM++ (B, C, ...).
            A realigned chain has one history, that of the mixed output. None: there was no step
            before.
        index: place of the timestep; needed only where it appears more than once.

    Returns:
        The Gaussian in the precision of x.

    Raises:
        ValueError: for a scheduler, or an option of its config, without a closed form, such as
            clipping and thresholding.
    """
    step = step_at(scheduler, timestep, index)
    channels = x.shape[1]
    x0, eps = _predictions(scheduler, step, x, output[:, :channels])
    variance_output = output[:, channels:]
    p = _sampler_step(scheduler, step, x0, eps, variance_output, eta, previous)
    return Gaussian(p.mean, p.variance.to(x))


def _sampler_step(
    scheduler: Any,
    step: Step,
    x0: Tensor,
    eps: Tensor,
    variance_output: Tensor,
    eta: float,
    previous: Tensor | None,
) -> Gaussian:
    """The step of the sampler that a scheduler stands for."""
    config = scheduler.config
    match type(scheduler).__name__:
        case "DDIMScheduler":
            return ddim(step, x0, eps, eta)
        case "DDPMScheduler":
            return ddpm(step, x0, eps, config.variance_type, variance_output)
        case "EulerDiscreteScheduler":
            return euler(step, x0, eps)
        case "EulerAncestralDiscreteScheduler":
            return euler_ancestral(step, x0, eps)
        case "DPMSolverMultistepScheduler":
            return dpm_solver(step, x0, eps, scheduler, previous)
        case "FlowMatchEulerDiscreteScheduler":
            if config.stochastic_sampling:
                return flow_stochastic(step, x0)
            return flow_euler(step, x0, eps)
        case _:
            # FlowMatchSDEScheduler: `step_at` has refused every other one.
            return flow_sde(step, x0, eps, scheduler.noise_std(step.index).double())


# The samplers.


def ddim(step: Step, x0: Tensor, eps: Tensor, eta: float) -> Gaussian:
    """DDIM (Song et al. 2021, Eq. 12 and 16).

    Args:
        step: the noise levels.
        x0: the predicted data (B, C, ...).
        eps: the predicted noise (B, C, ...).
        eta: 0 is deterministic, 1 has the noise of DDPM.
    """
    return _step_with_noise(step, x0, eps, _ancestral_std(step, eta))


def ddpm(
    step: Step, x0: Tensor, eps: Tensor, variance_type: str, variance_output: Tensor
) -> Gaussian:
    """DDPM (Ho et al. 2020): the ancestral mean, and a variance of its own.

    Args:
        step: the noise levels.
        x0: the predicted data (B, C, ...).
        eps: the predicted noise (B, C, ...).
        variance_type: one of `steps.DDPM_VARIANCES`; see `_ddpm_variance`.
        variance_output: the output's second half (B, C, ...), where the variance is learned.
    """
    mean = _step_with_noise(step, x0, eps, _ancestral_std(step)).mean
    return Gaussian(mean, _ddpm_variance(step, variance_type, variance_output))


def euler(step: Step, x0: Tensor, eps: Tensor) -> Gaussian:
    """Euler's step of the probability-flow ODE, without noise.

    It is Algorithm 1 of Karras et al. 2022 without its second-order correction.

    Args:
        step: the noise levels, with alpha = alpha_n = 1.
        x0: the predicted data (B, C, ...).
        eps: the predicted noise (B, C, ...).
    """
    return _step_without_noise(step, x0, eps)


def euler_ancestral(step: Step, x0: Tensor, eps: Tensor) -> Gaussian:
    """Euler ancestral: down past the next noise level, and back up with new noise.

    In x / alpha this is DDPM with `fixed_small`, and DDIM at eta = 1.

    Args:
        step: the noise levels, with alpha = alpha_n = 1.
        x0: the predicted data (B, C, ...).
        eps: the predicted noise (B, C, ...).
    """
    return _step_with_noise(step, x0, eps, _ancestral_std(step))


def dpm_solver(
    step: Step, x0: Tensor, eps: Tensor, scheduler: Any, previous: Tensor | None
) -> Gaussian:
    """DPM++ of order 1 or 2M, and their SDEs (Lu et al. 2022, "DPM-Solver++").

    The first order is DDIM at eta = 0, or at eta = 1 for the SDE. The second order adds a multiple
    of x0 - previous.

    Args:
        step: the noise levels.
        x0: the predicted data (B, C, ...).
        eps: the predicted noise (B, C, ...).
        scheduler: its config says the order, the form of the second-order term, and ODE or SDE.
        previous: the x0 of the step before (B, C, ...); None: there was none.
    """
    if scheduler.config.algorithm_type == "sde-dpmsolver++":
        first_order = _step_with_noise(step, x0, eps, _ancestral_std(step))
    else:
        first_order = _step_without_noise(step, x0, eps)
    if previous is None or not _is_second_order(scheduler, step):
        return first_order
    mean = first_order.mean + _second_order_factor(scheduler, step) * (x0 - previous)
    return Gaussian(mean, first_order.variance)


def flow_euler(step: Step, x0: Tensor, eps: Tensor) -> Gaussian:
    """Euler's step of the flow-matching ODE: x + (t_n - t) (eps - x0), without noise.

    Args:
        step: the noise levels, with alpha = 1 - t and sigma = t.
        x0: the predicted data (B, C, ...).
        eps: the predicted noise (B, C, ...).
    """
    return _step_without_noise(step, x0, eps)


def flow_stochastic(step: Step, x0: Tensor) -> Gaussian:
    """Flow Euler with `stochastic_sampling=True`: all noise is new, N((1 - t_n) x0, t_n^2).

    Args:
        step: the noise levels, with alpha = 1 - t and sigma = t.
        x0: the predicted data (B, C, ...).
    """
    return Gaussian(step.alpha_next * x0, step.sigma_next**2)


def flow_sde(step: Step, x0: Tensor, eps: Tensor, std: Tensor) -> Gaussian:
    """The SDE of flow matching by Euler-Maruyama (Liu et al. 2025, "Flow-GRPO", Eq. 9).

    Args:
        step: the noise levels, with alpha = 1 - t and sigma = t.
        x0: the predicted data (B, C, ...).
        eps: the predicted noise (B, C, ...).
        std: of the step's noise; `FlowMatchSDEScheduler.noise_std`.
    """
    eps_factor = step.sigma_next - std**2 / (2 * step.sigma)
    return Gaussian(step.alpha_next * x0 + eps_factor * eps, std**2)


# What the samplers are made of.


def _step_with_noise(step: Step, x0: Tensor, eps: Tensor, std: Tensor) -> Gaussian:
    """The step with noise of this std that keeps the marginals; see the top of this file."""
    eps_factor = (step.sigma_next**2 - std**2).sqrt()
    return Gaussian(step.alpha_next * x0 + eps_factor * eps, std**2)


def _step_without_noise(step: Step, x0: Tensor, eps: Tensor) -> Gaussian:
    return _step_with_noise(step, x0, eps, torch.zeros_like(step.sigma_next))


def _ancestral_std(step: Step, eta: float = 1.0) -> Tensor:
    """eta sigma_n sqrt(1 - (sigma_n alpha / (sigma alpha_n))^2) (Song et al. 2021, Eq. 16)."""
    return eta * step.sigma_next * (1 - step.noise_ratio**2).sqrt()


def _ddpm_variance(step: Step, variance_type: str, variance_output: Tensor) -> Tensor:
    """DDPM's variance (Ho et al. 2020, section 3.2), with diffusers' lower limit.

    Learned ones: the output itself, or between the two fixed ones on a logarithmic scale (Nichol
    and Dhariwal 2021, Eq. 15).
    """
    if step.time == 0:
        return torch.zeros(())
    is_learned = variance_type.startswith("learned")
    if is_learned and not variance_output.numel():
        raise ValueError(
            f"variance_type={variance_type!r} needs a network of twice the sample's channels: use "
            "variance_type='fixed_small'"
        )
    large = 1 - (step.alpha / step.alpha_next) ** 2
    small = ((step.sigma_next / step.sigma) ** 2 * large).clamp(min=1e-20)
    if variance_type == "learned":
        return variance_output
    if variance_type == "learned_range":
        share = (variance_output + 1) / 2
        return (share * large.log() + (1 - share) * small.log()).exp()
    return large if variance_type == "fixed_large" else small


def _is_second_order(scheduler: Any, step: Step) -> bool:
    """Whether DPM++ uses its history at this step. It may end with a first-order step."""
    config = scheduler.config
    steps = len(scheduler.timesteps)
    is_last = step.index == steps - 1
    is_short = config.lower_order_final and steps < 15
    ends_in_first_order = config.euler_at_final or config.final_sigmas_type == "zero" or is_short
    return config.solver_order == 2 and not (is_last and ends_in_first_order)


def _second_order_factor(scheduler: Any, step: Step) -> Tensor:
    """The factor of x0 - previous in a second-order step of DPM++.

    h is the gain of ln(alpha / sigma) of a step. The SDE's formulas have 2 h in its place.
    """
    before = step_at(scheduler, scheduler.timesteps[step.index - 1], step.index - 1)
    h = -step.noise_ratio.log()
    h_before = -before.noise_ratio.log()
    gain = 2 * h if scheduler.config.algorithm_type == "sde-dpmsolver++" else h
    if scheduler.config.solver_type == "midpoint":
        factor = -torch.expm1(-gain) / 2
    else:
        factor = 1 + torch.expm1(-gain) / gain
    return step.alpha_next * factor * h / h_before


# What a network gets and says.


def network_input(
    scheduler: Any, timestep: Tensor, x: Tensor, *, index: int | None = None
) -> Tensor:
    """The noisy sample as the network expects it.

    It is `scheduler.scale_model_input` without its side effect, a count of the steps.

    Args:
        scheduler: a diffusers scheduler, after `set_timesteps`.
        timestep: one of `scheduler.timesteps`.
        x: the noisy sample as the scheduler keeps it (B, ...).
        index: place of the timestep; needed only where it appears more than once.

    Returns:
        (B, ...). Only Euler's samples are scaled: x / alpha to variance 1.
    """
    if type(scheduler).__name__ not in EULER:
        return x
    sigma = step_at(scheduler, timestep, index).sigma
    return x * (1 + sigma**2).rsqrt()


def data_prediction(
    scheduler: Any, timestep: Tensor, x: Tensor, output: Tensor, *, index: int | None = None
) -> Tensor:
    """x0 as a network's output predicts it.

    Args:
        scheduler: a diffusers scheduler, after `set_timesteps`.
        timestep: one of `scheduler.timesteps`.
        x: the noisy sample as the scheduler keeps it (B, C, ...).
        output: the network's output (B, C, ...), or (B, 2C, ...) where the variance is learned.
        index: place of the timestep; needed only where it appears more than once.

    Returns:
        (B, C, ...).
    """
    step = step_at(scheduler, timestep, index)
    x0, _ = _predictions(scheduler, step, x, output[:, : x.shape[1]])
    return x0


def _predictions(scheduler: Any, step: Step, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """x0 and eps with x = alpha x0 + sigma eps, as the network's output predicts them."""
    alpha = step.alpha
    sigma = step.sigma
    kind = prediction_type(scheduler)

    if kind == "flow":  # The output is eps - x0, and alpha + sigma = 1.
        return x - sigma * output, x + alpha * output

    if kind == "v_prediction":  # The output is alpha eps - sigma x0, of x at variance 1.
        norm = (alpha**2 + sigma**2).sqrt()
        alpha = alpha / norm
        sigma = sigma / norm
        x = x / norm
        return alpha * x - sigma * output, sigma * x + alpha * output

    if kind == "sample":  # The output is x0.
        return output, (x - alpha * output) / sigma

    return (x - sigma * output) / alpha, output  # The output is eps.


# How far two models are apart.


def kl_factors(scheduler: Any) -> Tensor:
    """The factor c of each step with which c |D|^2 = 1/2 L |D_eps|^2.

    D is a difference of two models' outputs, whatever the network predicts, and D_eps the same
    difference as one of predicted noise. L = ln(SNR_n / SNR) is what the step gains in
    signal-to-noise ratio; for the last step, which ends where the ratio is infinite, it is 1.

        epsilon:       |D_eps|^2 = |D|^2
        v_prediction:  |D_eps|^2 = alpha_bar |D|^2
        sample:        |D_eps|^2 = SNR |D|^2
        flow:          c = ln(t / t_n) - (t - t_n), and (1 - t)^2 / 2 at the last step

    Flow's c is the integral of (1 - t) / t over the step, at a constant D.

    Args:
        scheduler: a diffusers scheduler, after `set_timesteps`; it need not have a closed form.

    Returns:
        (steps,) in double precision on the CPU. c |D|^2 is in nats.

    Raises:
        ValueError: for a scheduler without `alphas_cumprod` or flow times, and for an unknown
            prediction type.
    """
    kind = prediction_type(scheduler)
    if kind == "flow":
        return _flow_kl_factors(scheduler)
    bars = _alpha_bars(scheduler)
    snr = bars / (1 - bars)
    last_gain = torch.ones(1, dtype=snr.dtype)
    gains = torch.cat([snr.log().diff(), last_gain])

    squared_eps = {"epsilon": torch.ones_like(bars), "v_prediction": bars, "sample": snr}
    factors = 0.5 * gains * squared_eps[kind]
    # From pure noise alpha_bar is 0 and L infinite, and their product goes to 0.
    return factors.nan_to_num(nan=0.0, posinf=torch.inf)


def _flow_kl_factors(scheduler: Any) -> Tensor:
    """`kl_factors` of flow matching."""
    times = scheduler.sigmas.double().cpu()
    t = times[:-1]
    t_next = times[1:]
    factors = (t / t_next).log() - (t - t_next)
    last_factor = (1 - t[-1:]) ** 2 / 2
    return torch.cat([factors[:-1], last_factor])


def _alpha_bars(scheduler: Any) -> Tensor:
    """alpha_bar at each of `scheduler.timesteps` (steps,)."""
    if type(scheduler).__name__ == WUERSTCHEN:
        # Its timesteps end with that of the image, from which no step is taken.
        times = scheduler.timesteps[:-1].double().cpu()
        signal = torch.ones_like(times)
        return scheduler.add_noise(signal, torch.zeros_like(times), times).square()
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod, so that its steps' signal-to-noise "
            "ratio is not known"
        )
    # Noise over signal, also between the timesteps of training (Karras).
    if hasattr(scheduler, "sigmas"):
        sigmas = scheduler.sigmas[: len(scheduler.timesteps)]
        return 1 / (1 + sigmas.double().cpu() ** 2)
    return scheduler.alphas_cumprod.double().cpu()[scheduler.timesteps.long().cpu()]
