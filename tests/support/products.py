"""Products of parametrisations, of which a part is slow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def sparse_product(*lists: Sequence[Any], together: int = 1) -> Iterator[Any]:
    """All combinations of the values of some lists, as parameters of a test.

    Not slow are so few of them that each value is in one, or each two values are in one.

    Args:
        lists: the values of each parameter.
        together: 1: each value of a list; 2: each two values of two lists.
    """
    fast = _covering(list(product(*map(range, map(len, lists)))), together)
    for indices in product(*map(range, map(len, lists))):
        values = [parameter[index] for parameter, index in zip(lists, indices)]
        yield pytest.param(*values, marks=[] if indices in fast else [pytest.mark.slow])


def _covering(candidates: list[tuple[int, ...]], together: int) -> set[tuple[int, ...]]:
    """Combinations that hold all that the candidates hold.

    One after the other is chosen that holds the most that is missing, and of these the one whose
    values were used least.
    """
    held = {one: set(combinations(enumerate(one), together)) for one in candidates}
    missing = set().union(*held.values())
    used: Counter[tuple[int, int]] = Counter()
    chosen = set()

    def gain(one: tuple[int, ...]) -> tuple[int, int]:
        return len(held[one] & missing), -sum(used[value] for value in enumerate(one))

    while missing:
        best = max(candidates, key=gain)
        chosen.add(best)
        missing -= held[best]
        used.update(enumerate(best))
    return chosen
