"""What the ranks tell each other after a step: whether a number is bad, and whether to stop."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from deradiff.training.meters import EndedStep


class StepFlags(NamedTuple):
    """What was read of the steps so far.

    Attributes:
        failed: the first step that had a number that is not finite, on any rank; None: none had.
        signal_number: the largest signal number of all ranks; 0: no signal came.
    """

    failed: EndedStep | None
    signal_number: int


class _OnTheWay:
    """Numbers that are copied from the device to the host while both work on."""

    def __init__(self, numbers: Tensor) -> None:
        self.arrived: Any = None
        is_gpu = numbers.device.type == "cuda"
        self.numbers = numbers.to("cpu", non_blocking=is_gpu)
        if is_gpu:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> Tensor:
        """The numbers; waits for what the device had been given before them, and no longer."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers


class Exchange:
    """Sends the flags of each step to all ranks, and reads them a step later.

    To read them at once would make every rank wait for the device after every step. A process that
    is alone hears of its own signal at once.

    Args:
        accelerator: of the run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._sent: list[tuple[EndedStep, _OnTheWay]] = []
        self._own_signal = 0

    def send(self, ended: EndedStep, signal_number: int) -> None:
        """Send the flags of a step; collective where there are several ranks.

        Args:
            ended: the step.
            signal_number: that came to this rank; 0: none did.
        """
        # Filled on the device, since a copy of the host's number would wait for it.
        signal = torch.full_like(ended.bad, signal_number, dtype=torch.float32)
        flags = torch.stack([ended.bad.float(), signal]).unsqueeze(0)
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.gather(flags)
        else:
            self._own_signal = signal_number
        self._sent.append((ended, _OnTheWay(flags)))

    def read(self, all_steps: bool) -> StepFlags:
        """What was sent before the last step; every rank reads the same.

        Args:
            all_steps: read the last step too, and wait for the device.
        """
        first_failed = None
        signal_number = self._own_signal
        while len(self._sent) > (0 if all_steps else 1):
            ended, flags = self._sent.pop(0)
            failed, signal = flags.read().amax(0).tolist()
            if failed and first_failed is None:
                first_failed = ended
            signal_number = max(signal_number, int(signal))
            # A run that stops writes a checkpoint, which must hold good weights.
            all_steps = all_steps or signal_number > 0
        return StepFlags(first_failed, signal_number)
