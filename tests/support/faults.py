"""Faults, and the small runs of all stages that they befall: each command is a forked process."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from configs.entry import MISTAKES
from configs.tracking import TrackingConfig
from deradiff.locks import run_lock
from deradiff.training.preemption import REQUEUE, Preempted
from deradiff.worlds.shapes import held_out_captions
from eval.config import EvalConfig, ScorerConfig
from eval.stage import run as run_eval
from sample.config import SampleConfig
from sample.stage import run as run_sample
from tests.support.train_runs import go, small_run
from train.config import PanelConfig

REFUSED = 2
INTERRUPTED = 130
TRACEBACK = 1
LONGEST_RUN = 120  # seconds
UNCOMPARED = ("seconds", "gpu_hours", "digest")
"""Keys of records that hold a time, or follow from one."""


@dataclass(frozen=True)
class Stage:
    """A command that faults befall.

    Attributes:
        name: of the stage.
        command: what the process does; `work` is the folder of all runs.
        run_dir: where its run lies, below `work`.
        results: patterns of the files that count, below `work`.
    """

    name: str
    command: Callable[[Path], Any]
    run_dir: str
    results: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: its exit status; negative: the signal that killed it.
        message: what it said of an error.
    """

    status: int
    message: str

    @property
    def is_refusal(self) -> bool:
        """Whether it was refused in one sentence."""
        return self.status == REFUSED and len(self.message.strip().splitlines()) == 1


def stages(base: Path) -> list[Stage]:
    """The four commands on tiny models.

    Args:
        base: a tiny base model.
    """
    anchor = "train/x/anchor"
    none = TrackingConfig(kind="none")

    def train(work: Path) -> None:
        panel = PanelConfig(every=2, prompts=["a red circle"], lambdas=[0.0, 1.0], steps=1)
        config = small_run(base, work)
        go(replace(config, name="x", steps=5, checkpoint_every=2, panel=panel))

    def sampling(work: Path, **changes: Any) -> SampleConfig:
        config = SampleConfig(
            anchor=str(work / anchor),
            lambdas=[0.0, 0.5, 1.0],
            prompts=held_out_captions()[:3],
            steps=2,
            batch_size=2,
            guidance_scale=3.0,
            tracking=none,
            runs=str(work),
        )
        return replace(config, **changes)

    def sample(work: Path) -> None:
        run_sample(sampling(work), work / "sample/x")

    def bake(work: Path) -> None:
        config = sampling(work, lambdas=[0.5], bake=str(work / "baked"))
        run_sample(config, work / "sample/bake")

    def evaluate(work: Path) -> None:
        config = EvalConfig(
            samples=[str(work / "sample/x")],
            scorers={"colourful": ScorerConfig(), "vivid": ScorerConfig()},
            runs=str(work),
            name="x",
            tracking=none,
        )
        run_eval(config, work / "eval/x")

    images = ("manifest.jsonl", "lam=*/*.png", "grid.png")
    return [
        Stage("train", train, "train/x", (f"{anchor}/**/*",)),
        Stage("sample", sample, "sample/x", tuple(f"sample/x/{name}" for name in images)),
        Stage("bake", bake, "sample/bake", ("baked/*", "sample/bake*/lam=*/*.png")),
        Stage("eval", evaluate, "eval/x", ("eval/x/tables/*", "eval/x/plots/*", "eval/x/*.*")),
    ]


# Processes


def run(command: Callable[[], Any], disturb: Callable[[], Any], work: Path) -> Ended:
    """Run a command in a process of its own.

    Args:
        command: what it does.
        disturb: is called in it before.
        work: the folder of all runs; beside it the process leaves its message.
    """
    said = work.with_name("said")
    said.write_text("")
    process = os.fork()
    if not process:
        _work(command, disturb, said)
    status = _wait(process)
    return Ended(status, said.read_text())


def _work(command: Callable[[], Any], disturb: Callable[[], Any], said: Path) -> None:
    """Do a command's work as `configs.entry` does it, and end the process."""
    status = 0
    quiet = os.open(said.with_name("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.stdout = sys.stderr = os.fdopen(quiet, "w")
    # Python's own handler, whatever the shell has left.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    try:
        disturb()
        command()
    except Preempted as stop:
        status = INTERRUPTED if stop.signal_number == signal.SIGINT else REQUEUE
    except MISTAKES as error:
        said.write_text(f"{error}\n")
        status = REFUSED
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BaseException:
        said.write_text(traceback.format_exc())
        status = TRACEBACK
    os._exit(status)


def _wait(process: int) -> int:
    """The exit status of a process; one that hangs is killed."""
    end = time.monotonic() + LONGEST_RUN
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return TRACEBACK


# What happens to a process


def at_write(number: int, act: Callable[[int], Any]) -> Callable[[], None]:
    """A disturbance: at the n-th file that reaches the disk, and at none before, something happens.

    Args:
        number: n, from 1 on.
        act: what happens; it gets the descriptor of the file.
    """

    def disturb() -> None:
        sync = os.fsync
        count = 0

        def counted(descriptor: int) -> None:
            nonlocal count
            count += 1
            if count == number:
                act(descriptor)
            sync(descriptor)

        os.fsync = counted

    return disturb


def count_writes(command: Callable[[], Any], work: Path) -> int:
    """How many files of a command reach the disk."""
    counter = work.with_name("count")

    def disturb() -> None:
        sync = os.fsync

        def counted(descriptor: int) -> None:
            with open(counter, "ab") as file:
                file.write(b".")
            sync(descriptor)

        os.fsync = counted

    counter.write_bytes(b"")
    assert run(command, disturb, work).status == 0
    return counter.stat().st_size


def kill_half_written(share: float) -> Callable[[int], None]:
    """SIGKILL, of which a file keeps a share of its content."""

    def act(descriptor: int) -> None:
        if os.path.isfile(f"/proc/self/fd/{descriptor}"):
            os.ftruncate(descriptor, int(share * os.fstat(descriptor).st_size))
        os.kill(os.getpid(), signal.SIGKILL)

    return act


def send(signal_number: int) -> Callable[[int], None]:
    """A signal to the process itself."""
    return lambda descriptor: os.kill(os.getpid(), signal_number)


def kill_after(seconds: float) -> Callable[[], None]:
    """SIGKILL after a time, by a process of its own: the stage's may be busy."""

    def disturb() -> None:
        own = os.getpid()
        if not os.fork():
            time.sleep(seconds)
            if os.getppid() == own:
                os.kill(own, signal.SIGKILL)
            os._exit(0)

    return disturb


def full_from_now(descriptor: int) -> None:
    """No file reaches the disk from now on."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = full
    full(descriptor)


def nothing() -> None:
    """No disturbance."""


# What happens to files


def files_of(work: Path) -> list[Path]:
    """All files of the runs but those without content."""
    return sorted(path for path in work.rglob("*") if path.is_file() and path.stat().st_size)


def flip(file: Path, rng: random.Random) -> None:
    """Change one bit of a file, and nothing of its size and time."""
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    os.utime(file, ns=times)


def cut(file: Path, rng: random.Random) -> None:
    """Cut a file."""
    os.truncate(file, rng.randrange(file.stat().st_size))


def remove(file: Path, rng: random.Random) -> None:
    """Remove a file."""
    file.unlink()


# Where it happens


@contextmanager
def small_disk(work: Path, size: int) -> Iterator[None]:
    """A disk of so many bytes in the place of the runs, with what was there; for root alone."""
    before = work.with_name("before")
    os.rename(work, before)
    work.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", work], check=True)
    try:
        shutil.copytree(before, work, dirs_exist_ok=True)
        yield
        shutil.rmtree(before)
        shutil.copytree(work, before)
    finally:
        subprocess.run(["umount", "-l", work], check=True)
        work.rmdir()
        os.rename(before, work)


def can_mount() -> bool:
    """Whether a small disk can be had."""
    if os.geteuid() or sys.platform != "linux":
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@contextmanager
def held_by_another(run_dir: Path) -> Iterator[None]:
    """Another process works in a run directory while the context lasts."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        with run_lock(run_dir):
            os.write(writer, b".")
            time.sleep(LONGEST_RUN)
        os._exit(0)
    os.read(reader, 1)
    try:
        yield
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reader)
        os.close(writer)


# What is left


def results(stage: Stage, work: Path) -> dict[str, Any]:
    """What a command has made, by file: bytes, without times and what follows from them."""
    found = {}
    for pattern in stage.results:
        for file in sorted(work.glob(pattern)):
            if file.is_file():
                found[file.relative_to(work).as_posix()] = _content(file)
    return found


def _content(file: Path) -> Any:
    if file.suffix == ".json":
        return _without_times(json.loads(file.read_text()))
    if file.suffix == ".jsonl":
        return [_without_times(json.loads(line)) for line in file.read_text().splitlines()]
    if file.name == "README.md":
        return re.sub(r"\S+ GPU-hours", "", file.read_text())
    if file.name == "config.yaml":
        return None
    return file.read_bytes()


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in UNCOMPARED}


def left_aside(work: Path) -> list[Path]:
    """What killed writers have left in run directories."""
    folders = [work / name for name in ("train", "sample", "eval")]
    left: list[Path] = []
    for folder in folders:
        left += folder.rglob("*.part")
    return left
