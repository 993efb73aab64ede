"""Where a pipeline call stands, told from the times at which it asks its denoiser: pipelines do not say it themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOLERANCE = 0.005  # of a time that a pipeline rounded to bfloat16 on its way to the network


class Clock:
    """The step of the scheduler's that the pipeline is at.

    index: into `scheduler.timesteps`, or None while somebody calls the network on a time of their own, which is no step of a chain.
    first: the index at which this call of the pipeline began. began: whether that was now. call: 0 at a step's first evaluation;
    some pipelines make more, such as FLUX with true guidance. fraction: of training time, 0 at pure noise and 1 at the image.
    """

    def __init__(self, pipe: Any, scale: float = 1.0) -> None:
        self.pipe, self.scale = pipe, scale
        self.index: int | None = None
        self.first = self.call = 0
        self.began, self.fraction = False, 0.0
        self._timesteps: Any = None
        self._times: list[float] = []
        self._last = -1

    @property
    def starts(self) -> bool:
        """Whether this is the first evaluation of a chain."""
        return self.index is not None and self.index == self.first and self.call == 0

    @property
    def last(self) -> bool:
        """Whether this is the chain's last step."""
        return self.index == len(self._times) - 1

    def tick(self, timestep: Tensor | float) -> None:
        """One evaluation of the denoiser, on `timestep` as the network is told it: the scheduler's divided by `scale`."""
        scheduler = self.pipe.scheduler
        time = self.scale * float(torch.as_tensor(timestep).flatten()[0])
        if scheduler.timesteps is not self._timesteps:  # a pipeline sets them when it is called
            self._timesteps, self._times, self._last = (
                scheduler.timesteps,
                scheduler.timesteps.tolist(),
                -1,
            )
        self.index, self.began = self._find(time), False
        if self.index is not None:
            self.began = self.index < self._last or self._last < 0
            self.first = self.index if self.began else self.first
            self.call = self.call + 1 if self.index == self._last else 0
            self._last, time = self.index, self._times[self.index]
        self.fraction = 1 - time / scheduler.config.num_train_timesteps

    def _find(self, time: float) -> int | None:
        """By the scheduler's own count, where it keeps one; else the next step of that time, for some visit one twice."""
        index = getattr(self.pipe.scheduler, "step_index", None)
        if index is not None:
            return index if abs(self._times[index] - time) <= TOLERANCE * max(time, 1) else None
        later = [i for i, t in enumerate(self._times) if abs(t - time) <= TOLERANCE * max(time, 1)]
        ahead = [i for i in later if i > self._last]
        nearest = min(later, key=lambda i: abs(self._times[i] - time), default=None)
        return min(ahead, key=lambda i: (abs(self._times[i] - time), i), default=nearest)
