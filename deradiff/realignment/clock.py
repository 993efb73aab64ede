"""Where a pipeline call stands, known from the times at which it evaluates its denoiser.

Pipelines do not say it themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOLERANCE = 0.005
"""Relative error of a time that a pipeline rounded to bfloat16 on its way to the network."""


class Clock:
    """The scheduler's step that the pipeline is at. It moves with each `tick`.

    Args:
        pipe: the pipeline whose scheduler is followed.
        scale: the scheduler's time divided by the time that the network gets.

    Attributes:
        index: the step's index in `scheduler.timesteps`; None while somebody evaluates the network
            at a time of their own, which is no step of a chain.
        start_index: the index at which this call of the pipeline began.
        is_new_call: whether the last tick began a call of the pipeline.
        evaluation: 0 at a step's first evaluation. Some pipelines make more, such as FLUX with true
            guidance.
        fraction: of training time: 0 at pure noise, 1 at the image.
    """

    def __init__(self, pipe: Any, scale: float = 1.0) -> None:
        self.pipe = pipe
        self.scale = scale
        self.index: int | None = None
        self.start_index = 0
        self.evaluation = 0
        self.is_new_call = False
        self.fraction = 0.0
        self._timesteps: Any = None
        self._times: list[float] = []
        self._previous_index = -1

    @property
    def is_first_evaluation(self) -> bool:
        """Whether this is the first evaluation of a chain."""
        at_start = self.index is not None and self.index == self.start_index
        return at_start and self.evaluation == 0

    @property
    def is_last_step(self) -> bool:
        """Whether this is the chain's last step."""
        return self.index == len(self._times) - 1

    def tick(self, timestep: Tensor | float) -> None:
        """Note one evaluation of the denoiser.

        Args:
            timestep: as the network gets it: the scheduler's time divided by `scale`.
        """
        scheduler = self.pipe.scheduler
        time = self.scale * float(torch.as_tensor(timestep).flatten()[0])

        # A pipeline sets new timesteps when it is called
        if scheduler.timesteps is not self._timesteps:
            self._timesteps = scheduler.timesteps
            self._times = scheduler.timesteps.tolist()
            self._previous_index = -1

        self.index = self._find_index(time)
        self.is_new_call = False
        if self.index is not None:
            self.is_new_call = self.index < self._previous_index or self._previous_index < 0
            if self.is_new_call:
                self.start_index = self.index
            is_same_step = self.index == self._previous_index
            self.evaluation = self.evaluation + 1 if is_same_step else 0
            self._previous_index = self.index
            time = self._times[self.index]
        self.fraction = 1 - time / scheduler.config.num_train_timesteps

    def _find_index(self, time: float) -> int | None:
        """The step of a time: by the scheduler's own count, where it keeps one.

        Otherwise the next step of that time, because some schedulers visit one time twice.
        """
        tolerance = TOLERANCE * max(time, 1)
        counted = getattr(self.pipe.scheduler, "step_index", None)
        if counted is not None:
            return counted if abs(self._times[counted] - time) <= tolerance else None

        def distance(index: int) -> float:
            return abs(self._times[index] - time)

        near = [i for i in range(len(self._times)) if distance(i) <= tolerance]
        ahead = [i for i in near if i > self._previous_index]
        return min(ahead or near, key=distance, default=None)
