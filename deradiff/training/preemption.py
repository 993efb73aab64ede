"""A signal that asks a run to stop soon: heard at once, acted on between two optimiser steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)  # kill and Slurm's scancel; Slurm's --signal=USR1; submitit's
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: "try again later"


class Preempted(Exception):
    """Training stopped on a signal after writing a checkpoint: the same command goes on where it was."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} at step {step}; checkpoint written, the same command resumes"
        )
        self.number = number


class Listening:
    """While the block runs, a signal of SIGNALS only sets `number`; afterwards whoever handled it before handles it again."""

    number: int = 0

    def __enter__(self) -> Listening:
        self.before: dict[int, Any] = {}
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python lets no other thread handle signals
            self.before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.number = number

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
