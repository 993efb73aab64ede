"""What realignment costs: the KL of a realigned chain to the reference's, summed up while a pipeline samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deradiff.method.transitions import kl_factors
from deradiff.realignment.clock import Clock


class PathKL:
    """Sum over a pipeline call's steps of 1/2 L |D|^2 for each image, in nats; L = ln(SNR_next / SNR), D = eps_realigned - eps_reference.

    At one anchor D = lam (eps_anchor - eps_reference). |D|^2 sums over channels and pixels, after classifier-free guidance where the
    pipeline guides. An estimate, not a bound, within a tenth of the true KL at lam = 1 on analytic beds; `guidance_rescale`
    and clipping are not in it. Starts anew with each pipeline call. nan where a pipeline evaluates the network more than once a step
    (FLUX with true guidance, SD3 that skips layers): how it weighs the two is its own affair.
    """

    def __init__(self, pipe: Any, clock: Clock) -> None:
        self.pipe, self.clock, self.total = pipe, clock, torch.zeros(0)
        self._factors: list[float] = []

    @property
    def factor(self) -> float:
        """c of this step: 1/2 L |D_eps|^2 = c |D|^2 for differences D of the network's outputs, whatever it predicts."""
        assert self.clock.index is not None
        if self.clock.began:
            self._factors = kl_factors(self.pipe.scheduler).tolist()
        return self._factors[self.clock.index]

    def add(self, output: Tensor, pull: Tensor | None) -> None:
        """One evaluation of the denoiser: its output (rows, ...), and how far that is from the reference's; None: not known."""
        if self.clock.index is None:
            return
        if self.clock.began:
            self.total = torch.zeros(())
        known = pull is not None and self.clock.call == 0
        squared = self.squared(
            pull if known and pull is not None else torch.full_like(output, torch.nan)
        )
        self.total = self.factor * squared + self.total

    def squared(self, difference: Tensor) -> Tensor:
        """|D|^2 of each image after guidance: (images,) of (rows, ...)."""
        return self.guided(difference.float()).square().flatten(1).sum(1)

    def guided(self, difference: Tensor) -> Tensor:
        """Rows as images: a difference (2 images, ...) of unconditional and conditional rows as classifier-free guidance has it."""
        if (
            self.copies == 1 or len(difference) % 2
        ):  # odd: somebody else's loop over the network, after a guided call
            return difference
        unconditional, conditional = difference.chunk(2)  # the order of every diffusers pipeline
        return unconditional + self.pipe.guidance_scale * (conditional - unconditional)

    @property
    def copies(self) -> int:
        """Rows of the denoiser's batch for each image."""
        return 2 if getattr(self.pipe, "do_classifier_free_guidance", False) else 1
