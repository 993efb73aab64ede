"""Which step a pipeline is at. Pipelines do not say it: it follows from the times that they pass to
their denoiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOLERANCE = 0.005
"""Relative error of a time that a pipeline rounded to bfloat16 on its way to the network."""


class Clock:
    """The step of the scheduler that the pipeline is at.

    Args:
        pipe: a diffusers pipeline.
        scale: the scheduler's time divided by the time that the network gets.

    Attributes:
        index: of the step in `scheduler.timesteps`; None while somebody calls the network at a time
            of their own, which is no step of a chain.
        start_index: the index at which this call of the pipeline began.
        is_new_call: whether this evaluation is the first one of a call of the pipeline.
        evaluation: 0 at the first evaluation of a step. Some pipelines make more, such as FLUX with
            true guidance.
        fraction: of training time, 0 at pure noise and 1 at the image.
    """

    def __init__(self, pipe: Any, scale: float = 1.0) -> None:
        self.pipe = pipe
        self.scale = scale
        self.index: int | None = None
        self.start_index = 0
        self.is_new_call = False
        self.evaluation = 0
        self.fraction = 0.0
        self._timesteps: Any = None
        self._times: list[float] = []
        self._previous_index = -1

    @property
    def is_first_evaluation(self) -> bool:
        """Whether this is the first evaluation of a chain."""
        is_step = self.index is not None
        return is_step and self.index == self.start_index and self.evaluation == 0

    @property
    def is_last_step(self) -> bool:
        """Whether this is the last step of a chain."""
        return self.index == len(self._times) - 1

    def tick(self, timestep: Tensor | float) -> None:
        """Note one evaluation of the denoiser.

        Args:
            timestep: as the network gets it: a number, or one for each row.
        """
        scheduler = self.pipe.scheduler
        time = self.scale * float(torch.as_tensor(timestep).flatten()[0])

        # A pipeline sets the scheduler's timesteps when it is called.
        if scheduler.timesteps is not self._timesteps:
            self._timesteps = scheduler.timesteps
            self._times = scheduler.timesteps.tolist()
            self._previous_index = -1

        # An index that goes back, or the first one of new timesteps, begins a call.
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
        """The index of a time, by the scheduler's own count where it keeps one.

        Without a count it is the next step of that time: some schedulers visit a time twice.
        """
        index = getattr(self.pipe.scheduler, "step_index", None)
        if index is not None:
            return index if _is_close(self._times[index], time) else None

        matches = [i for i, known in enumerate(self._times) if _is_close(known, time)]
        if not matches:
            return None
        ahead = [i for i in matches if i > self._previous_index]
        return min(ahead or matches, key=lambda i: abs(self._times[i] - time))


def _is_close(known: float, time: float) -> bool:
    return abs(known - time) <= TOLERANCE * max(time, 1)
