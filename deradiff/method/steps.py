"""The noise levels between which a diffusers scheduler steps.

Every sampler of `deradiff.method.transitions` has noisy samples x = alpha x0 + sigma eps. This
module reads alpha and sigma, before and after a step, from the scheduler's own tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
"""Schedulers whose sample is x / alpha: its signal is x0 itself, its noise has no upper bound."""

FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchSDEScheduler")
"""Schedulers of flow matching: alpha = 1 - t and sigma = t, for times t from 1 to 0."""

DPM = "DPMSolverMultistepScheduler"

WUERSTCHEN = "DDPMWuerstchenScheduler"
"""Stable Cascade's: DDPM at times from 1 to 0, whose noise levels are a formula and no table."""

CLOSED_FORM = (*EULER, *FLOW, DPM, "DDIMScheduler", "DDPMScheduler")
"""Schedulers whose step has a closed form here."""

DDPM_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")
"""The values of DDPM's `variance_type` that have a closed form here."""


@dataclass(frozen=True)
class Step:
    """One step of a scheduler: its place in the chain, and the noise levels on both sides.

    The noise levels are numbers () in double precision.

    Attributes:
        index: place in `scheduler.timesteps`.
        time: the timestep.
        alpha: factor of x0 before the step.
        sigma: factor of eps before the step.
        alpha_next: factor of x0 after the step.
        sigma_next: factor of eps after the step.
    """

    index: int
    time: float
    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    sigma_next: Tensor

    @property
    def noise_ratio(self) -> Tensor:
        """(sigma_next / alpha_next) / (sigma / alpha), which is exp(-h) of DPM-Solver."""
        return self.sigma_next * self.alpha / (self.sigma * self.alpha_next)


def step_at(scheduler: Any, timestep: Tensor, index: int | None = None) -> Step:
    """The step that a scheduler takes from a timestep.

    Args:
        scheduler: a diffusers scheduler, after `set_timesteps`.
        timestep: one of `scheduler.timesteps`.
        index: its place there; needed only where the timestep appears more than once.

    Raises:
        ValueError: for a scheduler, or an option of its config, without a closed form; and for a
            timestep that does not appear exactly once, if there is no index.
    """
    check_closed_form(scheduler)
    if index is None:
        index = _index_of(scheduler, timestep)
    if type(scheduler).__name__ in (*EULER, *FLOW, DPM):
        before = _level_of_sigma(scheduler, scheduler.sigmas[index].double())
        after = _level_of_sigma(scheduler, scheduler.sigmas[index + 1].double())
    else:
        bar, bar_next = _alpha_bars_around(scheduler, timestep)
        before = _level_of_alpha_bar(bar)
        after = _level_of_alpha_bar(bar_next)
    return Step(index, float(timestep), *before, *after)


def prediction_type(scheduler: Any) -> str:
    """What the network predicts: epsilon, v_prediction, sample or flow.

    Args:
        scheduler: a diffusers scheduler. Its config says it, in words that differ by class.

    Raises:
        ValueError: for anything else.
    """
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow"
    if type(scheduler).__name__ == WUERSTCHEN:
        return "epsilon"
    kind = scheduler.config.prediction_type
    if kind == "original_sample":  # A second name that Euler has.
        return "sample"
    if kind == "flow_prediction":
        return "flow"
    if kind not in ("epsilon", "v_prediction", "sample", "flow"):
        raise ValueError(
            f"prediction_type={kind!r} is not known: use epsilon, v_prediction, sample or "
            "flow_prediction"
        )
    return kind


def check_closed_form(scheduler: Any) -> None:
    """Check that `deradiff.method.transitions` has this scheduler's step.

    Args:
        scheduler: a diffusers scheduler.

    Raises:
        ValueError: for a scheduler, or an option of its config, whose step has no closed form.
    """
    name = type(scheduler).__name__
    if name not in CLOSED_FORM:
        raise ValueError(
            f"no closed form of {name}'s step here: use DDIM, DDPM, Euler, Euler ancestral, DPM++ "
            "multistep or flow Euler"
        )
    config = scheduler.config
    remedies = _remedies(name, config)
    if name == DPM:
        remedies |= _dpm_remedies(config)
    if remedies:
        option, remedy = next(iter(remedies.items()))
        raise ValueError(
            f"no closed form of {name}'s step with {option}={config[option]!r}: {remedy}"
        )


def _remedies(name: str, config: Any) -> dict[str, str]:
    """Options without a closed form, and what to set instead."""
    remedies = {}
    # A prediction that is clipped is not linear in the network's output.
    for option in ("clip_sample", "thresholding", "invert_sigmas"):
        if config.get(option, False):
            remedies[option] = f"set {option}=False"
    if name == "DDPMScheduler" and config.variance_type not in DDPM_VARIANCES:
        remedies["variance_type"] = f"use one of {', '.join(DDPM_VARIANCES)}"
    return remedies


def _dpm_remedies(config: Any) -> dict[str, str]:
    """Options of DPM++ without a closed form, and what to set instead."""
    remedies = {}
    if config.variance_type is not None:
        remedies["variance_type"] = "use None"
    if config.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"):
        remedies["algorithm_type"] = "use 'dpmsolver++' or 'sde-dpmsolver++'"
    if config.solver_order > 2:
        remedies["solver_order"] = "use 1 or 2"
    if config.use_flow_sigmas != (config.prediction_type == "flow_prediction"):
        remedies["use_flow_sigmas"] = (
            "use it with prediction_type='flow_prediction', and only there"
        )
    return remedies


def _index_of(scheduler: Any, timestep: Tensor) -> int:
    """Place of a timestep that appears once."""
    places = (scheduler.timesteps == timestep).nonzero().flatten().tolist()
    if len(places) != 1:
        raise ValueError(
            f"timestep {float(timestep):g} appears {len(places)} times in scheduler.timesteps: "
            "pass its index"
        )
    return places[0]


def _level_of_sigma(scheduler: Any, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of an entry of `scheduler.sigmas`, whose meaning differs by scheduler."""
    name = type(scheduler).__name__
    if name in EULER:
        return torch.ones_like(sigma), sigma
    if name in FLOW or scheduler.config.use_flow_sigmas:
        return 1 - sigma, sigma
    # DPM++ keeps noise over signal.
    return _level_of_alpha_bar(1 / (1 + sigma**2))


def _level_of_alpha_bar(bar: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) where the noisy data have variance 1."""
    return bar.sqrt(), (1 - bar).sqrt()


def _alpha_bars_around(scheduler: Any, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_bar before and after a step of DDIM or DDPM."""
    time = int(timestep)
    if type(scheduler).__name__ == "DDIMScheduler":
        # All steps of DDIM are of this length, also where its next timestep lies elsewhere.
        next_time = time - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        final = scheduler.final_alpha_cumprod
    else:
        next_time = int(scheduler.previous_timestep(timestep))
        final = scheduler.one
    bar = scheduler.alphas_cumprod[time]
    bar_next = scheduler.alphas_cumprod[next_time] if next_time >= 0 else final
    return bar.double(), bar_next.double()
