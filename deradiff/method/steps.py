"""The noise levels between which a diffusers scheduler steps, for every sampler whose step has a
closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EULER = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)  # they keep x / alpha, whose noise grows without bound
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchSDEScheduler")
DDPM_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")


@dataclass(frozen=True)
class Step:
    """A step's place in `scheduler.timesteps`, and the marginals x = alpha x0 + sigma eps before
    and after it, in double precision."""

    index: int
    time: float
    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    sigma_next: Tensor

    @property
    def noise_ratio(self) -> Tensor:
        """Noise over signal after the step, divided by the same before it: exp(-h) of
        DPM-Solver."""
        return self.sigma_next * self.alpha / (self.sigma * self.alpha_next)


def step_at(scheduler: Any, timestep: Tensor, index: int | None = None) -> Step:
    """The step from `timestep`, one of `scheduler.timesteps`; index: its place there, needed only
    where it stands there twice.

    Raises ValueError for a scheduler, or an option of its config, whose step has no closed form
    (`transitions.transition`).
    """
    _check(scheduler)
    if index is None:
        places = (scheduler.timesteps == timestep).nonzero().flatten().tolist()
        if len(places) != 1:
            raise ValueError(
                f"timestep {float(timestep):g} stands {len(places)} times in "
                f"scheduler.timesteps: give its index"
            )
        (index,) = places
    kind, config = type(scheduler).__name__, scheduler.config
    if kind in EULER or kind in FLOW or kind == "DPMSolverMultistepScheduler":
        sigma, sigma_next = scheduler.sigmas[index].double(), scheduler.sigmas[index + 1].double()
        if kind in EULER:
            return Step(
                index,
                float(timestep),
                torch.ones_like(sigma),
                sigma,
                torch.ones_like(sigma),
                sigma_next,
            )
        if kind in FLOW or config.use_flow_sigmas:
            return Step(index, float(timestep), 1 - sigma, sigma, 1 - sigma_next, sigma_next)
        bar, bar_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
    elif kind == "DDIMScheduler":
        following = int(timestep) - config.num_train_timesteps // scheduler.num_inference_steps
        bar, bar_next = (
            _alpha_bar(scheduler, int(timestep)),
            _alpha_bar(scheduler, following, scheduler.final_alpha_cumprod),
        )
    else:
        bar, bar_next = (
            _alpha_bar(scheduler, int(timestep)),
            _alpha_bar(scheduler, int(scheduler.previous_timestep(timestep)), scheduler.one),
        )
    return Step(
        index, float(timestep), bar.sqrt(), (1 - bar).sqrt(), bar_next.sqrt(), (1 - bar_next).sqrt()
    )


def _alpha_bar(scheduler: Any, timestep: int, final: Any = None) -> Tensor:
    return (scheduler.alphas_cumprod[timestep] if timestep >= 0 else final).double()


def prediction_type(scheduler: Any) -> str:
    """What the network predicts: epsilon, v_prediction, sample, or flow. Raises ValueError for
    anything else."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow"
    names = {"original_sample": "sample", "flow_prediction": "flow"}  # Euler's, and DPM++'s
    kind = names.get(scheduler.config.prediction_type, scheduler.config.prediction_type)
    if kind not in ("epsilon", "v_prediction", "sample", "flow"):
        raise ValueError(
            f"prediction_type={kind!r} is not known: use epsilon, v_prediction, sample or "
            f"flow_prediction"
        )
    return kind


def _check(scheduler: Any) -> None:
    """ValueError for a scheduler, or an option of its config, whose step has no closed form
    here."""
    kind, config = type(scheduler).__name__, scheduler.config
    if kind not in (*EULER, *FLOW, "DPMSolverMultistepScheduler", "DDIMScheduler", "DDPMScheduler"):
        raise ValueError(
            f"no closed form of {kind}'s step here: use DDIM, DDPM, Euler, Euler ancestral, "
            f"DPM++ multistep or flow Euler"
        )
    wrong = {
        "clip_sample": config.get(
            "clip_sample", False
        ),  # a clipped prediction is not linear in the output
        "thresholding": config.get("thresholding", False),
        "invert_sigmas": config.get("invert_sigmas", False),
        "variance_type": kind == "DDPMScheduler" and config.variance_type not in DDPM_VARIANCES,
    }
    if kind == "DPMSolverMultistepScheduler":
        wrong |= {
            "variance_type": config.variance_type is not None,
            "algorithm_type": config.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"),
            "solver_order": config.solver_order > 2,
            "use_flow_sigmas": config.use_flow_sigmas
            != (config.prediction_type == "flow_prediction"),
        }
    for option in (name for name, is_wrong in wrong.items() if is_wrong):
        raise ValueError(
            f"no closed form of {kind}'s step with {option}={config[option]!r}: {_instead(option)}"
        )


def _instead(option: str) -> str:
    use = {
        "algorithm_type": "'dpmsolver++' or 'sde-dpmsolver++'",
        "solver_order": "1 or 2",
        "variance_type": f"one of {', '.join(DDPM_VARIANCES)} with DDPM, and none elsewhere",
        "use_flow_sigmas": "it with prediction_type='flow_prediction', and only there",
    }
    return f"use {use[option]}" if option in use else f"set {option}=False"
