"""What realignment costs in KL divergence, summed up while a pipeline samples.

Shapes: rows of the denoiser's batch; images = rows / rows_per_image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deradiff.method.transitions import kl_factors
from deradiff.realignment.clock import Clock


class PathKL:
    """The KL divergence of a realigned chain from the reference's, for each image, in nats.

    The sum over the steps of one call of the pipeline of 1/2 L |D|^2, where
    L = ln(SNR_next / SNR) and D = eps_realigned - eps_reference; with one anchor
    D = lam (eps_anchor - eps_reference). |D|^2 sums over channels and pixels, after classifier-free
    guidance where the pipeline guides.

    It is an estimate, not a bound: within a tenth of the true KL at lam = 1 on analytic beds. The
    effect of `guidance_rescale` and of clipping is not in it. It is nan where a pipeline evaluates
    the network more than once a step (FLUX with true guidance, SD3 that skips layers), because the
    weights of these evaluations are the pipeline's own.

    Args:
        pipe: the pipeline that samples.
        clock: the step that it is at.

    Attributes:
        total: the sum so far (images,).
    """

    def __init__(self, pipe: Any, clock: Clock) -> None:
        self.pipe = pipe
        self.clock = clock
        self.total = torch.zeros(0)
        self._factors: list[float] = []

    @property
    def factor(self) -> float:
        """The c of this step in 1/2 L |D_eps|^2 = c |D|^2.

        D is a difference of the network's outputs, whatever the network predicts.
        """
        assert self.clock.index is not None
        if self.clock.is_new_call:
            self._factors = kl_factors(self.pipe.scheduler).tolist()
        return self._factors[self.clock.index]

    @property
    def rows_per_image(self) -> int:
        """Rows of the denoiser's batch for each image: 2 with classifier-free guidance, else 1."""
        return 2 if getattr(self.pipe, "do_classifier_free_guidance", False) else 1

    def add(self, output: Tensor, shift: Tensor | None) -> None:
        """Add one evaluation of the denoiser.

        Args:
            output: the realigned output (rows, ...).
            shift: that output minus the reference's (rows, ...); None: unknown.
        """
        if self.clock.index is None:
            return
        if self.clock.is_new_call:
            self.total = torch.zeros(())
        if shift is None or self.clock.evaluation > 0:
            shift = torch.full_like(output, torch.nan)
        self.total = self.factor * self.squared(shift) + self.total

    def squared(self, difference: Tensor) -> Tensor:
        """|D|^2 of each image after guidance: (images,) of (rows, ...)."""
        return self.guided(difference.float()).square().flatten(1).sum(1)

    def guided(self, difference: Tensor) -> Tensor:
        """A difference of outputs after classifier-free guidance: (images, ...) of (rows, ...)."""
        # An odd number of rows: another loop calls the network after a guided call.
        if self.rows_per_image == 1 or len(difference) % 2:
            return difference
        # The order of rows in every diffusers pipeline.
        unconditional, conditional = difference.chunk(2)
        return unconditional + self.pipe.guidance_scale * (conditional - unconditional)
