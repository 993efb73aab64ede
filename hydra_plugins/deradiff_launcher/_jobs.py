"""Processes side by side: started, watched, told about, and ended with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

GRACE = 35.0  # seconds between SIGTERM and SIGKILL: torch's elastic agent takes up to 30 to end its workers


@dataclass
class Job:
    """name: what varies, for the user. command: argument list. run_dir: where the run writes."""

    name: str
    command: list[str]
    run_dir: Path

    @property
    def log(self) -> Path:
        return self.run_dir / "launch.log"


def run_jobs(jobs: list[Job], workers: int, one_thread: bool) -> list[str]:
    """Run every job, at most `workers` at once, and say how each ended. Returns a phrase per failed job.

    With one worker the jobs write to our own output; side by side each appends to its `launch.log`.
    An interrupt, or SIGTERM, ends every child before it passes on.
    """
    env = dict(os.environ, PYTHONUNBUFFERED="1")
    if one_thread:
        env.setdefault("OMP_NUM_THREADS", "1")
    side_by_side = min(workers, len(jobs)) > 1
    waiting, running, failed = (
        list(jobs),
        dict[subprocess.Popen[bytes], tuple[Job, float]](),
        list[str](),
    )
    with _terminate_as_interrupt():
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.pop(0)
                    print(
                        f"start {job.name}" + (f", output in {job.log}" if side_by_side else ""),
                        flush=True,
                    )
                    running[_start(job, env, side_by_side)] = job, time.monotonic()
                for process in [p for p in running if p.poll() is not None]:
                    job, started = running.pop(process)
                    ended = (
                        f"failed with status {process.returncode}" if process.returncode else "done"
                    )
                    print(
                        f"{job.name}: {ended} after {time.monotonic() - started:.0f} s", flush=True
                    )
                    if process.returncode:
                        failed.append(f"{job.name} ({_last_words(job) if side_by_side else ended})")
                time.sleep(0.05)
        finally:
            _end(list(running))
    return failed


def _start(job: Job, env: dict[str, str], to_log: bool) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches us alone, and everything that the job starts can be ended as one group.
    if not to_log:
        return subprocess.Popen(job.command, env=env, start_new_session=True)
    job.run_dir.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        return subprocess.Popen(
            job.command,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _last_words(job: Job) -> str:
    lines = job.log.read_text(errors="replace").strip().splitlines() or ["it wrote nothing"]
    return f"{lines[-1]}: see {job.log}"


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):  # it ended meanwhile
        os.killpg(process.pid, number)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM (a cluster's, or `kill`) ends the children as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
