"""Processes side by side: started, watched, and ended together with their parent."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from deradiff.terminal import say

GRACE_SECONDS = 35.0
"""Between SIGTERM and SIGKILL: torch's elastic agent takes up to 30 to end its workers."""

POLL_SECONDS = 0.05

PROGRESS_SECONDS = 10.0
"""From one line about the jobs that run to the next."""

LAST_BYTES = 4096
"""How much of the end of a log is read for its last line."""

Process = subprocess.Popen[bytes]


@dataclass
class Job:
    """One run.

    Attributes:
        name: the overrides that tell it from the others.
        command: its argument list.
        run_dir: where it writes.
    """

    name: str
    command: list[str]
    run_dir: Path

    @property
    def log(self) -> Path:
        """The file of its output, where jobs run side by side."""
        return self.run_dir / "launch.log"


def run_jobs(jobs: Sequence[Job], workers: int, one_thread: bool) -> list[str]:
    """Run every job and print how each ended. A failed job does not stop the others.

    With one worker the jobs write to our own output. Side by side each appends to its `launch.log`,
    and we print when it starts, how far it is, and the last line that it wrote.
    An interrupt, or SIGTERM, ends every child before it is passed on.

    Args:
        jobs: to run, in this order.
        workers: how many run at once, at most.
        one_thread: limit each job to one thread, unless OMP_NUM_THREADS says otherwise.

    Returns:
        A phrase for each job that failed.
    """
    crew = _Crew(workers, one_thread, to_logs=min(workers, len(jobs)) > 1)
    waiting = list(jobs)
    with _terminate_as_interrupt():
        # An interrupt leaves this loop, and ends what still runs.
        try:
            while waiting or crew.running:
                while waiting and crew.has_room():
                    crew.start(waiting.pop(0))
                crew.collect()
                crew.tell()
                time.sleep(POLL_SECONDS)
        finally:
            _end(list(crew.running))
    return crew.failures


class _Crew:
    """The processes that run now.

    Args:
        workers: how many may run at once.
        one_thread: limit each process to one thread.
        to_logs: write each job's output to its log, not to our own output.

    Attributes:
        running: the job of each process, and when it was started.
        failures: a phrase for each job that failed.
    """

    def __init__(self, workers: int, one_thread: bool, to_logs: bool) -> None:
        self.workers = workers
        self.to_logs = to_logs
        self.environment = dict(os.environ, PYTHONUNBUFFERED="1")
        if one_thread:
            self.environment.setdefault("OMP_NUM_THREADS", "1")
        self.running: dict[Process, tuple[Job, float]] = {}
        self.told: dict[str, str] = {}
        self.last_told = time.monotonic()
        self.failures: list[str] = []

    def has_room(self) -> bool:
        return len(self.running) < self.workers

    def start(self, job: Job) -> None:
        output = f", output in {job.log}" if self.to_logs else ""
        say(f"start {job.name}{output}")
        self.running[self._process(job)] = (job, time.monotonic())

    def _process(self, job: Job) -> Process:
        # In a session of its own: Ctrl-C reaches us alone, and all that the job starts can be
        # ended as one group.
        if not self.to_logs:
            return subprocess.Popen(job.command, env=self.environment, start_new_session=True)
        job.run_dir.mkdir(parents=True, exist_ok=True)
        with open(job.log, "ab") as log:
            return subprocess.Popen(
                job.command,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def collect(self) -> None:
        """Print how the processes ended that have ended since the last call."""
        for process in [process for process in self.running if process.poll() is not None]:
            job, start = self.running.pop(process)
            status = process.returncode
            outcome = f"failed with status {status}" if status else "done"
            seconds = time.monotonic() - start
            last = _last_line(job.log) if self.to_logs else ""
            result = f"; {last}" if last and not status else ""
            say(f"{job.name}: {outcome} after {seconds:.0f} s{result}")
            if status:
                reason = outcome
                if self.to_logs:
                    reason = f"{last or 'it wrote nothing'}: see {job.log}"
                self.failures.append(f"{job.name} ({reason})")

    def tell(self) -> None:
        """Print, now and then, the last line of each log that has a new one."""
        is_soon = time.monotonic() - self.last_told < PROGRESS_SECONDS
        if not self.to_logs or is_soon:
            return
        self.last_told = time.monotonic()
        for job, _ in self.running.values():
            line = _last_line(job.log)
            if line and line != self.told.get(job.name):
                self.told[job.name] = line
                say(f"{job.name}: {line}")


def _last_line(log: Path) -> str:
    """The last line of a log, or what stands there now of a progress bar; empty: it has none."""
    with open(log, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - LAST_BYTES))
        end = file.read().decode(errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]+", end)]
    return next((line for line in reversed(lines) if line), "")


def _end(processes: list[Process]) -> None:
    """End processes and all that they started: politely first, then by SIGKILL."""
    for process in processes:
        _signal_group(process, signal.SIGTERM)

    # All of them share the time that they have.
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _signal_group(process: Process, signal_number: int) -> None:
    # It may have ended meanwhile.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal_number)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM (of a cluster, or of `kill`) ends the children as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
