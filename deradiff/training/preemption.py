"""A signal that asks a run to stop soon: noted at once, acted on between two optimiser steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (
    signal.SIGINT,  # Ctrl-C
    signal.SIGTERM,  # kill, and Slurm's scancel
    signal.SIGUSR1,  # Slurm's --signal=USR1
    signal.SIGUSR2,  # submitit
)
AGAIN = b"stopping after this step, with a checkpoint; Ctrl-C again stops at once\n"
STDERR = 2  # its file descriptor
REQUEUE = 75  # the exit status EX_TEMPFAIL of sysexits.h: "try again later"


class Preempted(Exception):
    """Training stopped on a signal, after it wrote a checkpoint; the same command resumes.

    Attributes:
        signal_number: the signal that asked for the stop.
    """

    def __init__(self, signal_number: int, step: int) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(
            f"stopped by {name} at step {step}; checkpoint written, the same command resumes"
        )
        self.signal_number = signal_number


class RanksLost(Exception):
    """Another rank is gone; the same command resumes. The exit status is that of a preemption."""


class Listening:
    """A block in which the signals of SIGNALS are only noted; a second Ctrl-C interrupts at once.

    After the block, whatever handled them before handles them again.

    Attributes:
        signal_number: the last signal that arrived; 0: none did.
    """

    signal_number: int = 0

    def __enter__(self) -> Listening:
        self._handlers_before: dict[int, Any] = {}
        # Python lets no other thread handle signals.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._handlers_before[number] = signal.signal(number, self._note)
        return self

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        is_ctrl_c = signal_number == signal.SIGINT
        if is_ctrl_c and self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        if is_ctrl_c:
            # A handler may interrupt a print, which cannot begin another.
            os.write(STDERR, AGAIN)
        self.signal_number = signal_number

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signal_number, handler in self._handlers_before.items():
            signal.signal(signal_number, handler)
