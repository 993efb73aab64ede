"""Ctrl-C during the seconds in which a command is imported: a sentence, as later, no traceback.

A command imports this module before all others, and `configs.entry.entry` ends its work.
"""

import os
import signal
from types import FrameType

INTERRUPTED_STATUS = 130


def _end(signal_number: int, frame: FrameType | None) -> None:
    """End the process at once: it holds nothing yet."""
    os.write(2, b"interrupted before the command began\n")
    os._exit(INTERRUPTED_STATUS)


def hand_over() -> None:
    """Put Python's own handler back, which raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Not where another one is there, as under nohup.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
