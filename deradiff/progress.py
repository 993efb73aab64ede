"""Progress bars of long work, for people at a terminal and for readers of a log."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from tqdm import tqdm

TERMINAL_INTERVAL = 0.2
LOG_INTERVAL = 10.0
"""Seconds from one line to the next, at a terminal and in a log."""


class LivingBar(tqdm):
    """A bar that is written anew while nothing moves it, so that long work is never silent.

    Args:
        args: of tqdm.
        kwargs: of tqdm.

    Attributes:
        doing: what is being done, for the time between two moves; empty: nothing to say.
    """

    last_print_t: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.doing = ""
        self._is_over = threading.Event()
        super().__init__(*args, **kwargs)
        if not self.disable:
            threading.Thread(target=self._live, daemon=True).start()

    def _live(self) -> None:
        """Write the bar where it has not been written for a while."""
        while not self._is_over.wait(LOG_INTERVAL / 4):
            silent = time.time() - self.last_print_t
            if silent < LOG_INTERVAL or self._is_over.is_set():
                continue
            if self.doing:
                self.set_postfix_str(self.doing, refresh=False)
            self.refresh()
            self.last_print_t = time.time()

    def close(self) -> None:
        """Write the bar for the last time."""
        self._is_over.set()
        super().close()


def progress_bar(
    total: int, description: str | None, unit: str, *, is_shown: bool = True, leave: bool = True
) -> LivingBar:
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
    return LivingBar(
        total=total,
        desc=description,
        unit=f" {unit}",
        disable=not is_shown,
        leave=leave or not is_terminal,
        mininterval=interval,
        maxinterval=interval,
    )
