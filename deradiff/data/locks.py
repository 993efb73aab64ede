"""Locks by which processes share work on numbered files.

They end with the process that holds them, so a process that was killed leaves none behind.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


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
