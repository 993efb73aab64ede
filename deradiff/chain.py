"""Algorithm 1 of DeRaDiff to the letter: a realigned reverse chain drawn from the closed-form posterior mixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deradiff.gaussian import geometric_mixture
from deradiff.transitions import network_input, transition

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x, t) -> eps: a noisy sample (B, ...) of variance abar v + 1 - abar, for data of variance v, and its timestep."""


def realigned_chain(
    reference: Denoiser, anchor: Denoiser, scheduler: Any, x: Tensor, lam: float, eta: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Samples (B, ...) of the realigned model at lam, from initial noise x (B, ...) over `scheduler.timesteps`.

    Each step forms both models' transitions at the same x, mixes them geometrically and draws once. eta: DDIM's.
    Where the step is linear in eps and its variance fixed, as it is for these schedulers, `realign` comes to the same in any pipeline.
    """
    for t in scheduler.timesteps:
        scaled = network_input(scheduler, t, x)
        p_reference = transition(scheduler, t, x, reference(scaled, t), eta)
        p_anchor = transition(scheduler, t, x, anchor(scaled, t), eta)
        p = geometric_mixture(p_reference, p_anchor, lam)
        x = p.mean + p.variance.sqrt() * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x
