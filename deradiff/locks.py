"""Locks by which processes share work on numbered files, and keep out of each other's runs.

They end with the process that holds them, so a process that was killed leaves none behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUN_LOCK = ".lock"

LONGEST_OWNER = 1000
"""Bytes of the line that says whose a lock is."""


class Locks:
    """A lock for every number, while the context lasts.

    Lock i is byte i of an empty file (POSIX record locks).

    Args:
        file: is created where it is missing.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> Locks:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def share(self, numbers: list[int]) -> Iterator[int]:
        """Each number once, its lock held by this process until the next number is asked for.

        First come the numbers that no other process works on, then the others, as those processes
        finish. The caller has to check whether the work on a number was done meanwhile.
        """
        waiting = []
        for number in numbers:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except OSError:
                waiting.append(number)
                continue
            yield from self._until_done(number)
        for number in waiting:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, number)
            yield from self._until_done(number)

    def _until_done(self, number: int) -> Iterator[int]:
        try:
            yield number
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)


@contextmanager
def run_lock(run_dir: Path, is_main_process: bool = True) -> Iterator[None]:
    """Keep other commands out of a run directory while the context lasts.

    The main process of a run holds the lock for all of its ranks. It is a lock of the file system
    on `<run_dir>/.lock`, in which the owner's machine and process id stand. It ends with its owner,
    also where that is killed or its machine goes down, so nobody has to remove the file. It holds
    between machines where the file system's locks do (NFS, Lustre with `flock`). Where a file
    system has none, a living process of this machine is respected.

    Args:
        run_dir: the run directory; it is made where it is missing.
        is_main_process: other processes hold nothing.

    Raises:
        ValueError: where another command works in that directory; it names its process.
    """
    if not is_main_process:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / RUN_LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(descriptor, run_dir)
        # The owner is written down, for those who ask.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _take(descriptor: int, run_dir: Path) -> None:
    """Take the lock of an open file. Raises ValueError where another process has it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except OSError as error:
        is_taken = error.errno in (errno.EACCES, errno.EAGAIN)
    # Without locks in the file system, what is written in the file has to do.
    owner = os.pread(descriptor, LONGEST_OWNER, 0).decode(errors="replace").strip()
    if is_taken or _lives_here(owner):
        raise ValueError(
            f"{run_dir} is in use by {owner or 'another process'}: wait until that has ended, end "
            "it, or choose another name for this run"
        )


def _lives_here(owner: str) -> bool:
    """Whether an owner is another process of this machine that runs."""
    found = re.fullmatch(r"process (\d+) on (.+)", owner)
    if found is None or found[2] != socket.gethostname() or int(found[1]) == os.getpid():
        return False
    return is_running(int(found[1]))


def is_running(process: int) -> bool:
    """Whether a process of this machine runs.

    Args:
        process: its id.
    """
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True
