"""Products of parametrisations, of which a part is slow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest


def sparse_product(*lists: Sequence[Any]) -> Iterator[Any]:
    """All combinations of the values of some lists, as parameters of a test.

    As few are not slow as hold every value once: those on the diagonal, on which a shorter list
    begins again.

    Args:
        lists: the values of each parameter.
    """
    longest = max(len(values) for values in lists)
    fast = []
    for index in range(longest):
        fast.append(tuple(values[index % len(values)] for values in lists))
    for combination in product(*lists):
        marks = [] if combination in fast else [pytest.mark.slow]
        yield pytest.param(*combination, marks=marks)
