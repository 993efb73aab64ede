"""Checks that the stages' configs share.

Each raises ValueError in one sentence that names the key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePath


def choice(key: str, value: str | None, allowed: Iterable[str | None]) -> None:
    """Raises ValueError where `value` is not among `allowed`; a None among them is not listed."""
    names = list(allowed)
    if value not in names:
        known = ", ".join(name for name in names if name)
        raise ValueError(f"{key} must be one of {known}, not {value!r}")


def positive(key: str, value: float) -> None:
    """Raises ValueError where `value` is not a finite number above 0."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{key} must be above 0, not {value}")


def not_negative(key: str, value: float) -> None:
    """Raises ValueError where `value` is not a finite number of at least 0."""
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{key} must be at least 0, not {value}")


def check_run_name(name: str) -> None:
    """Raises ValueError where a run's name would lead out of the folder of runs."""
    path = PurePath(name)
    is_inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    if not is_inside or not name.isprintable():
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
