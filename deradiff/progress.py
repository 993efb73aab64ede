"""Progress bars of long work, for people at a terminal and for readers of a log."""

from __future__ import annotations

import sys

from tqdm import tqdm

TERMINAL_INTERVAL = 0.2
LOG_INTERVAL = 10.0
"""Seconds from one line to the next, at a terminal and in a log."""


def progress_bar(
    total: int, description: str | None, unit: str, *, is_shown: bool = True, leave: bool = True
) -> tqdm:
    """A progress bar, which says how far it is and when it will end.

    Args:
        total: of what it counts.
        description: what stands before it.
        unit: what it counts, in the singular.
        is_shown: whether anybody wants to see it.
        leave: keep its last line at a terminal; a log keeps it always.
    """
    is_terminal = sys.stderr.isatty()
    interval = TERMINAL_INTERVAL if is_terminal else LOG_INTERVAL
    return tqdm(
        total=total,
        desc=description,
        unit=f" {unit}",
        disable=not is_shown,
        leave=leave or not is_terminal,
        mininterval=interval,
        maxinterval=interval,
    )
