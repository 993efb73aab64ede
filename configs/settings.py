"""One setting of a stage's config: its default and its help text, side by side."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import field, is_dataclass
from typing import Any


def setting(default: Any, help: str, is_list: bool = False) -> Any:
    """A dataclass field with a help text, which `--help` prints.

    Args:
        default: the value where none is given; a list, dict or dataclass is copied for each config.
        help: what the setting does, in a few words.
        is_list: whether it takes a list and nothing else, where its type does not say so.
    """
    metadata = {"help": help, "is_list": is_list}
    if isinstance(default, list | dict) or is_dataclass(default):
        return field(default_factory=lambda: deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)
