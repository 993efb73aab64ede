"""Processes that begin as this one stands: what is imported needs not be imported again."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def start(work: Callable[[], object]) -> int:
    """Fork a process that does some work; returns its id.

    Args:
        work: what the process does.
    """
    process = os.fork()
    if process:
        return process
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def succeeds(work: Callable[[], object]) -> bool:
    """Whether a process of its own does some work without an error, which is on stderr.

    Args:
        work: what the process does.
    """
    _, status = os.waitpid(start(work), 0)
    return os.WEXITSTATUS(status) == 0
