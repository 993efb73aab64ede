"""The rank and the alpha of each layer of a LoRA, by what peft's LoraConfig says of them.

peft takes the keys of `rank_pattern` and `alpha_pattern` for regular expressions. Somebody else's
may never come to an end, so here most keys are taken literally, and the others are bounded.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

LITERAL = re.compile(r"\^?(?:[\w-]|\\?\.)+")
"""A key that is the end of a layer's name, or after ^ the whole name."""

GROUP_REPEATED = re.compile(r"\)\s*[*+?{]")
QUANTIFIER = re.compile(r"[*+{]")
BACK_REFERENCE = re.compile(r"\\\d|\(\?")

MOST_QUANTIFIERS = 2
MOST_LENGTH = 200
MOST_EXPRESSIONS = 20
"""Of regular expressions: within them a search takes milliseconds, whatever they say."""

LARGEST = 65504.0
"""The largest number of float16, which no weight and no scale comes near."""

DEFAULT = 8
"""peft's rank and alpha where a config says nothing."""


class LayerPatterns:
    """The values of a `rank_pattern` or `alpha_pattern`, found by a layer's name as peft does.

    Args:
        patterns: values by key; None: none.
        setting: what the pattern is called in the config.
        name: how an error names the anchor.

    Raises:
        ValueError: for keys that are regular expressions without bounds.
    """

    def __init__(self, patterns: Any, setting: str, name: str) -> None:
        if not isinstance(patterns, Mapping | None):
            raise ValueError(
                f"{name} has {setting}={reprlib.repr(patterns)} in its config, which is no values "
                "by layer"
            )
        # By key: which one it is, because the first that fits counts, and its value.
        self._literal: dict[str, tuple[int, Any]] = {}
        self._expressions: list[tuple[int, re.Pattern[str], Any]] = []
        for number, (key, value) in enumerate((patterns or {}).items()):
            if LITERAL.fullmatch(key):
                self._literal.setdefault(key.replace("\\", ""), (number, value))
            else:
                expression = _bounded(key, setting, name)
                self._expressions.append((number, expression, value))
        if len(self._expressions) > MOST_EXPRESSIONS:
            raise ValueError(
                f"{name} has {len(self._expressions)} regular expressions in {setting} of its "
                f"config, and at most {MOST_EXPRESSIONS} are read: name its layers there"
            )

    def value_of(self, layer: str, default: Any) -> Any:
        """The value of a layer.

        Args:
            layer: its name.
            default: where no key fits.
        """
        found = [self._literal[end] for end in _ends(layer) if end in self._literal]
        for number, expression, value in self._expressions:
            if expression.match(layer):
                found.append((number, value))
        return min(found, key=lambda pair: pair[0])[1] if found else default


def _ends(layer: str) -> Iterator[str]:
    """What a literal key for a layer can be: its name after ^, or the end of it behind a dot."""
    yield f"^{layer}"
    parts = layer.split(".")
    for start in range(len(parts)):
        yield ".".join(parts[start:])


def _bounded(key: str, setting: str, name: str) -> re.Pattern[str]:
    """A key as a regular expression. Raises ValueError for one whose search may never end."""
    is_bounded = (
        len(key) <= MOST_LENGTH
        and len(QUANTIFIER.findall(key)) <= MOST_QUANTIFIERS
        and not GROUP_REPEATED.search(key)
        and not BACK_REFERENCE.search(key)
    )
    refusal = (
        f"{name} has the key {reprlib.repr(key)} in {setting} of its config, which is no layer's "
        "name and no simple regular expression: name the layers there"
    )
    if not is_bounded:
        raise ValueError(refusal)
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(refusal) from error


def check_rank(rank: Any, name: str) -> int:
    """A rank of a config. Raises ValueError for what is none.

    Args:
        rank: what the config says.
        name: how an error names the anchor.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(
            f"{name} has the rank {reprlib.repr(rank)} in its config: give a LoRA whose config is "
            "whole"
        )
    return rank


def check_alpha(alpha: Any, rank: int, name: str) -> float:
    """An alpha of a config. Raises ValueError for what is none, or makes a scale that none has.

    Args:
        alpha: what the config says.
        rank: of its layer.
        name: how an error names the anchor.
    """
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or not abs(alpha) <= LARGEST * rank or not math.isfinite(alpha):
        raise ValueError(
            f"{name} has alpha {reprlib.repr(alpha)} at rank {rank}, which no LoRA has: it is "
            "damaged, so fetch or copy it again"
        )
    return alpha
