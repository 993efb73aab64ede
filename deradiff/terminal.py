"""What is said at the terminal: whole lines, in which the text of a stranger moves no cursor.

Everything that a command prints goes through `say` and `warn`; `PrintableRecord` does the same for
what libraries log.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from deradiff.texts import on_one_line, printable


def say(*lines: str, is_main: bool = True) -> None:
    """Print lines on stdout.

    Args:
        lines: a line break within one, as a file's name may have it, is printed as its code.
        is_main: other processes of a run say nothing.
    """
    if is_main:
        _print(lines, sys.stdout)


def warn(*lines: str) -> None:
    """Print lines on stderr.

    Args:
        lines: as of `say`.
    """
    _print(lines, sys.stderr)


def _print(lines: tuple[str, ...], stream: TextIO) -> None:
    """Print lines at once. Where nobody reads them, as after `| head`, the work goes on."""
    try:
        print("\n".join(map(on_one_line, lines)), file=stream, flush=True)
    except BrokenPipeError:
        # What is printed from now on goes nowhere, so that it does not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class PrintableRecord(logging.LogRecord):
    """What is logged, printable: on one line where it is ours. Other packages log tables, too."""

    def getMessage(self) -> str:
        """The message with its arguments."""
        message = super().getMessage()
        is_ours = self.name.partition(".")[0] == "deradiff"
        return on_one_line(message) if is_ours else printable(message)
