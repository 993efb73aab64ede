"""What realignment costs: the KL of a realigned chain to the reference's, summed up while a pipeline samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deradiff.transitions import log_snr_steps, squared_eps_per_output


class PathKL:
    """Sum over a pipeline call's steps of 1/2 L |D|^2 for each image, in nats; L = ln(SNR_next / SNR), D = eps_realigned - eps_reference.

    At one anchor D = lam (eps_anchor - eps_reference). |D|^2 sums over channels and pixels, after classifier-free guidance where the
    pipeline guides. An estimate, not a bound, within a tenth of the true KL at lam = 1 on analytic beds; `guidance_rescale`
    and clipping are not in it. Starts anew with each pipeline call, which sets the scheduler's timesteps.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.total = pipe, torch.zeros(0)
        self._timesteps: Any = None
        self._times: list[float] = []
        self._index = -1

    def add(self, timestep: Tensor | float, realigned: Tensor, reference: Tensor | None) -> None:
        """One evaluation of the denoiser: its outputs (N, C, H, W), N = images, or twice that with guidance; reference None: not known."""
        t = float(torch.as_tensor(timestep).flatten()[0])
        if self.pipe.scheduler.timesteps is not self._timesteps or t not in self._times[self._index + 1 :]:
            self._start()
        if t not in self._times:  # somebody calls the network on a time of their own: no step of a chain
            return
        self._index = self._times.index(t, self._index + 1)
        difference = torch.full_like(realigned, torch.nan) if reference is None else realigned.float() - reference.float()
        squared = self._guided(difference).square().flatten(1).sum(1)
        self.total = self._factors[self._index] * squared + (self.total if len(self.total) else 0)

    def _start(self) -> None:
        scheduler = self.pipe.scheduler
        self._timesteps, self._times, self._index = scheduler.timesteps, scheduler.timesteps.tolist(), -1
        self._factors = (0.5 * log_snr_steps(scheduler) * squared_eps_per_output(scheduler)).tolist()
        self.total = torch.zeros(0)

    def _guided(self, difference: Tensor) -> Tensor:
        if not getattr(self.pipe, "do_classifier_free_guidance", False):
            return difference
        unconditional, conditional = difference.chunk(2)  # the order of every diffusers pipeline
        return unconditional + self.pipe.guidance_scale * (conditional - unconditional)
