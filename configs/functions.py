"""Functions whose modules are imported when they are needed, and not before."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def function_at(place: str) -> Callable[..., Any]:
    """A function, its module imported now.

    Args:
        place: `module:name`.
    """
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
