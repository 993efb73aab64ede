"""The samplers that a command can name: a scheduler of diffusers' or ours, and its options.

A new sampler is a row here. Any scheduler whose step is linear in the network's output works inside
`realign`. `deradiff.method.chain` needs the closed form of the step, too: the noise levels in
`steps`, a function in `transitions`, and a row of `tests/method/test_transitions.py`, which holds
it equal to the scheduler's own step.

This table imports nothing heavy: configs read it before torch is loaded.
`schedulers.make_scheduler` makes the scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

UNCLIPPED = (("clip_sample", False),)
"""Clipping is for pixels in [-1, 1]. Latents leave that range, and a clipped step is not linear."""


@dataclass(frozen=True)
class Sampler:
    """How a chain is sampled.

    Attributes:
        scheduler: the class, of diffusers or of `deradiff.method.schedulers`.
        options: its settings besides the base model's own noise schedule, as (name, value).
        flow: whether it is for flow-matching families.
        takes_eta: whether it has DDIM's eta.
        exact_spacing: whether it steps to its own next timestep only where the number of steps fits
            the timestep spacing.
    """

    scheduler: str
    options: tuple[tuple[str, Any], ...] = ()
    flow: bool = False
    takes_eta: bool = False
    exact_spacing: bool = False


SAMPLERS = {
    "ddim": Sampler("DDIMScheduler", UNCLIPPED, takes_eta=True, exact_spacing=True),
    "ddpm": Sampler("DDPMScheduler", UNCLIPPED),
    "euler": Sampler("EulerDiscreteScheduler"),
    "euler_ancestral": Sampler("EulerAncestralDiscreteScheduler"),
    "dpmpp_2m": Sampler(
        "DPMSolverMultistepScheduler",
        (("algorithm_type", "dpmsolver++"), ("solver_order", 2)),
    ),
    "dpmpp_2m_sde": Sampler(
        "DPMSolverMultistepScheduler",
        (("algorithm_type", "sde-dpmsolver++"), ("solver_order", 2)),
    ),
    # Without diffusers' stochastic_sampling=True: even an exact model's chain with it misses the
    # model's distribution (docs/oracle.md)
    "flow_euler": Sampler(
        "FlowMatchEulerDiscreteScheduler", (("stochastic_sampling", False),), flow=True
    ),
    "flow_sde": Sampler("FlowMatchSDEScheduler", flow=True),
}


def samplers_for(flow: bool) -> list[str]:
    """Names of the samplers for one kind of model family.

    Args:
        flow: for flow-matching families; False: for the others.
    """
    return [name for name, sampler in SAMPLERS.items() if sampler.flow == flow]
