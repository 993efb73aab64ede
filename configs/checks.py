"""Checks that the stages' configs share.

Each raises ValueError in one sentence that names the key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePath

LONGEST_NAME = 200
"""Bytes of a folder's name: file systems take 255, and our files' names aside are longer."""

LARGEST_COUNT = 2**31
"""Of steps, pairs, images or whatever else a key counts."""


def choice(key: str, value: str | None, allowed: Iterable[str | None]) -> None:
    """Raises ValueError where `value` is not among `allowed`; a None among them is not listed."""
    names = list(allowed)
    if value not in names:
        known = ", ".join(name for name in names if name)
        raise ValueError(f"{key} must be one of {known}, not {value!r}")


def positive(key: str, value: float) -> None:
    """Raises ValueError where `value` is not a number above 0 that can be computed with."""
    _bounded(key, value)
    if not value > 0:
        raise ValueError(f"{key} must be above 0, not {value}")


def not_negative(key: str, value: float) -> None:
    """Raises ValueError where `value` is not a number of at least 0 that can be computed with."""
    _bounded(key, value)
    if not value >= 0:
        raise ValueError(f"{key} must be at least 0, not {value}")


def at_most(key: str, value: float, limit: float) -> None:
    """Raises ValueError where `value` is more than `limit`."""
    if value > limit:
        raise ValueError(f"{key} must be at most {limit:g}, not {value}")


def check_seed(key: str, seed: object) -> None:
    """Raises ValueError for what is no seed of torch's generators."""
    is_seed = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63
    if not is_seed:
        raise ValueError(f"{key} must be a whole number of at least 0, below 2^63, not {seed!r}")


def _bounded(key: str, value: float) -> None:
    """Raises ValueError for a number that is not finite, and for a count that no run comes to."""
    if not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, not {value}")
    if isinstance(value, int) and value > LARGEST_COUNT:
        raise ValueError(f"{key} must be at most {LARGEST_COUNT}, not {value}")


def check_run_name(name: str, runs: str) -> None:
    """Raises ValueError where a run's name would lead out of the folder of runs, or is none."""
    if not runs.strip():
        raise ValueError("runs is empty: give runs=<folder>, or runs=. for the one you are in")
    path = PurePath(name)
    is_inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    is_short = all(len(part.encode()) <= LONGEST_NAME for part in path.parts)
    if not is_inside or not name.isprintable() or not name.strip() or not is_short:
        raise ValueError(
            f"name={name!r} is no folder below the runs of this stage: give a name such as first, "
            "and with runs=<folder> another place"
        )


@contextmanager
def section(name: str) -> Iterator[None]:
    """Put a section of the config before the argument that an error of the library names.

    The library says `vae=x is no folder`; the user typed `model.vae=x`. Messages that do not begin
    with an argument stay as they are, but for `give vae=<...>` in them.

    Args:
        name: of the section whose keys are called as the library's arguments are.
    """
    try:
        yield
    except ValueError as error:
        message = re.sub(r"^(?=\w+=)|(?<=: give )(?=\w+=<)", f"{name}.", str(error))
        if message == str(error):
            raise
        raise ValueError(message) from error
