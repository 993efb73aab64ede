"""Checks that the stages' configs share: each raises ValueError in one sentence that names the key."""

from __future__ import annotations

import math
from collections.abc import Iterable


def choice(key: str, value: str | None, allowed: Iterable[str | None]) -> None:
    """value must be one of allowed; None among them is not shown."""
    names = list(allowed)
    if value not in names:
        raise ValueError(
            f"{key} must be one of {', '.join(name for name in names if name)}, not {value!r}"
        )


def positive(key: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{key} must be above 0, not {value}")


def not_negative(key: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{key} must be at least 0, not {value}")
