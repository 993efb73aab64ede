"""What realignment costs: the KL of a realigned chain to the reference's chain.

Shapes: images are P, rows of the network's batch are R. R = 2 P with classifier-free guidance in
one batch, and P otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deradiff.method.transitions import kl_factors
from deradiff.realignment.clock import Clock


class PathKL:
    """Sum of 1/2 L |D|^2 over a pipeline call's steps, for each image, in nats.

    L = ln(SNR_next / SNR), and D = eps_realigned - eps_reference; with one anchor,
    D = lam (eps_anchor - eps_reference). |D|^2 sums over channels and pixels, after classifier-free
    guidance where the pipeline guides.

    It is an estimate, not a bound: within a tenth of the true KL at lam = 1 on analytic beds.
    `guidance_rescale` and clipping are not in it. It starts anew with each pipeline call. It is nan
    where a pipeline evaluates the network more than once a step (FLUX with true guidance, SD3 that
    skips layers), because only the pipeline knows how it weighs the two.

    Args:
        pipe: the pipeline.
        clock: its position in the chain.

    Attributes:
        total: (P,), the sum so far.
    """

    def __init__(self, pipe: Any, clock: Clock) -> None:
        self.pipe = pipe
        self.clock = clock
        self.total = torch.zeros(0)
        self._factors: list[float] = []

    @property
    def factor(self) -> float:
        """c of this step: 1/2 L |D_eps|^2 = c |D|^2 for differences D of the network's outputs."""
        assert self.clock.index is not None
        if self.clock.is_new_call:
            self._factors = kl_factors(self.pipe.scheduler).tolist()
        return self._factors[self.clock.index]

    def add(self, output: Tensor, shift: Tensor | None) -> None:
        """Add one evaluation of the denoiser.

        Args:
            output: the realigned output (R, ...).
            shift: how far it is from the reference's output; None where that is not known.
        """
        if self.clock.index is None:
            return
        if self.clock.is_new_call:
            self.total = torch.zeros(())
        if shift is None or self.clock.evaluation > 0:
            shift = torch.full_like(output, torch.nan)
        self.total = self.factor * self.squared(shift) + self.total

    def squared(self, difference: Tensor) -> Tensor:
        """|D|^2 of each image after guidance: (P,) for a difference (R, ...)."""
        return self.guided(difference.float()).square().flatten(1).sum(1)

    def guided(self, difference: Tensor) -> Tensor:
        """A difference after classifier-free guidance: (P, ...) for (R, ...).

        Guidance is linear, so it acts on differences as on outputs.
        """
        # An odd number of rows comes from somebody else's loop over the network
        if self.rows_per_image == 1 or len(difference) % 2:
            return difference
        # The order of every diffusers pipeline
        unconditional, conditional = difference.chunk(2)
        return unconditional + self.pipe.guidance_scale * (conditional - unconditional)

    @property
    def rows_per_image(self) -> int:
        """Rows of the denoiser's batch for each image: 2 with classifier-free guidance, else 1."""
        return 2 if getattr(self.pipe, "do_classifier_free_guidance", False) else 1
