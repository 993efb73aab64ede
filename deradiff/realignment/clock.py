"""Which step a pipeline is at.

The scheduler knows it: where the chain begins, and how many steps it has taken since. What time the
network is told has no part in it, because each family tells it in another way (t, t / 1000,
1 - t / 1000, one number for each token, rounded to bfloat16).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Clock:
    """The step of the scheduler that the pipeline is at.

    Attributes:
        scheduler: the scheduler; None: the pipeline has none.
        index: of the step in `scheduler.timesteps`; None while somebody calls the network outside
            a chain.
        start_index: the index at which this chain began.
        chain: the number of the chain.
        is_new_call: whether this evaluation is the first one of a chain.
        evaluation: 0 at the first evaluation of a step. Pipelines with true guidance make more.
        fraction: of training time, 0 at pure noise and 1 at the image.
        sees_steps: whether the clock is told of the steps that the scheduler takes.
    """

    def __init__(self) -> None:
        self.scheduler: Any = None
        self.index: int | None = None
        self.start_index = 0
        self.chain = 0
        self.is_new_call = False
        self.evaluation = 0
        self.fraction = 0.0
        self.sees_steps = True
        # The scheduler's timesteps, and the same as numbers.
        self._timesteps: Any = None
        self._times: list[float] = []
        # A chain is announced, has begun, and ends with the last of its times.
        self._is_announced = False
        self._is_running = False
        self._steps_taken = 0
        self._evaluations_of_step = 0
        # Whether the network is told the scheduler's own time.
        self._is_told_time = False

    @property
    def is_first_evaluation(self) -> bool:
        """Whether this is the first evaluation of a chain."""
        is_step = self.index is not None
        return is_step and self.index == self.start_index and self.evaluation == 0

    @property
    def is_last_step(self) -> bool:
        """Whether this is the last step of a chain."""
        return self.index is not None and self.index == len(self._times) - 1

    @property
    def steps(self) -> int:
        """The number of steps of the whole schedule."""
        return len(self._times)

    def follow(self, scheduler: Any) -> None:
        """Go by another scheduler, which may have its timesteps already.

        Args:
            scheduler: the scheduler; None: the pipeline has none.
        """
        self.scheduler = scheduler
        self.announce_chain()
        self._is_announced = getattr(scheduler, "num_inference_steps", None) is not None

    def announce_chain(self) -> None:
        """Note that the scheduler gets new timesteps."""
        self._is_announced = True
        self._is_running = False
        self.index = None

    def finish_step(self) -> None:
        """Note that the scheduler has taken a step."""
        if not self._is_running:
            return
        # Some pipelines call the scheduler twice for one step, and set its own count back.
        counted = getattr(self.scheduler, "step_index", None)
        self._steps_taken = self._steps_taken + 1 if counted is None else counted - self.start_index
        self._evaluations_of_step = 0
        if self.start_index + self._steps_taken >= len(self._times):
            self._is_running = False

    def tick(self, timestep: Tensor | float | None) -> None:
        """Note one evaluation of the denoiser.

        Args:
            timestep: the time that the network is told; None: it is told none.
        """
        self.is_new_call = False
        if self._is_announced:
            self._begin(timestep)
        self.index = self._current_index(timestep) if self._is_running else None
        if self.index is None:
            return
        self.evaluation = self._evaluations_of_step
        self._evaluations_of_step += 1
        self.fraction = self._fraction_of_time()

    def _begin(self, timestep: Tensor | float | None) -> None:
        """Begin a chain at its first evaluation."""
        scheduler = self.scheduler
        self._timesteps = scheduler.timesteps
        self._times = torch.as_tensor(scheduler.timesteps).flatten().tolist()
        self._is_announced = False
        self._is_running = bool(self._times)
        self._steps_taken = 0
        self._evaluations_of_step = 0
        self.is_new_call = self._is_running
        self.chain += 1

        # An image to start from skips steps. The scheduler counts them, or the time tells. No chain
        # starts at a time of 1 in 1000: a network that is told it is told t / 1000.
        matches = self._matches(timestep)
        matches = [index for index in matches if self._times[index] > 1 or max(self._times) <= 1]
        start = getattr(scheduler, "step_index", None)
        if start is None:
            start = getattr(scheduler, "begin_index", None)
        if start is None:
            start = matches[0] if matches else 0
        self.start_index = start
        self._is_told_time = start in matches and _is_precise(timestep)

    def _current_index(self, timestep: Tensor | float | None) -> int | None:
        """The scheduler's own count where it keeps one, and ours of the steps taken elsewhere.

        Where the network is told the scheduler's own time, that has the last word: somebody may
        take steps of their own, or evaluate the network at a time that is none of the chain's.
        """
        counted = getattr(self.scheduler, "step_index", None)
        if counted is None or not 0 <= counted < len(self._times):
            if not self.sees_steps and not self._is_told_time:
                return None
            counted = min(self.start_index + self._steps_taken, len(self._times) - 1)
        if not self._is_told_time:
            return counted
        matches = self._matches(timestep)
        if not matches:
            return None
        ahead = [index for index in matches if index >= counted]
        index = ahead[0] if ahead else matches[0]
        if index != counted:
            self._follow_time(index)
        return index

    def _follow_time(self, index: int) -> None:
        """Go on at a step that the scheduler did not take; a step back begins a new chain."""
        if index < self.start_index + self._steps_taken:
            self.is_new_call = True
            self.chain += 1
            self.start_index = index
        self._steps_taken = index - self.start_index
        self._evaluations_of_step = 0

    def _matches(self, timestep: Tensor | float | None) -> list[int]:
        """The indices of a time that the network is told, in the precision in which it is told."""
        if timestep is None:
            return []
        position = _position_in(self._timesteps, timestep)
        if position is not None:
            told = self._times[position]
            return [index for index, time in enumerate(self._times) if time == told]

        # Any other tensor on a GPU has to be waited for.
        values = torch.as_tensor(timestep).flatten()
        if not values.numel():
            return []
        known = torch.tensor(self._times, dtype=torch.float64)
        if values.is_floating_point():
            known = known.to(values.dtype)
        # Of several times the largest: parts that are given, as a first frame, are told 0.
        is_equal = known.double() == values.max().cpu().double()
        return is_equal.nonzero().flatten().tolist()

    def _fraction_of_time(self) -> float:
        """1 - t / T where the times run from T to 0, and the share of the steps elsewhere."""
        assert self.index is not None
        scale = self.scheduler.config.get("num_train_timesteps") or 1
        if min(self._times) < 0 or max(self._times) > scale or max(self._times) <= 0.01 * scale:
            return self.index / len(self._times)
        return 1 - self._times[self.index] / scale


def _is_precise(timestep: Tensor | float | None) -> bool:
    """Whether a time that the network is told tells neighbouring steps apart."""
    return not isinstance(timestep, Tensor) or timestep.dtype not in (torch.bfloat16, torch.half)


def _position_in(timesteps: Any, timestep: Any) -> int | None:
    """Where a time lies in the scheduler's own tensor; None: it is no element of that tensor.

    Most pipelines tell the network an element of it, whose value is then known without asking the
    device.
    """
    if type(timesteps) is not Tensor or type(timestep) is not Tensor or timesteps.ndim != 1:
        return None
    is_one_element = timestep.numel() == 1 or not any(timestep.stride())
    same_memory = timesteps.untyped_storage().data_ptr() == timestep.untyped_storage().data_ptr()
    if not is_one_element or not same_memory or timesteps.dtype != timestep.dtype:
        return None
    distance = int(timestep.storage_offset()) - int(timesteps.storage_offset())
    position, rest = divmod(distance, timesteps.stride(0) or 1)
    return position if not rest and 0 <= position < len(timesteps) else None
