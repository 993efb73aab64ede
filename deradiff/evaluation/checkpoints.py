"""Anchors that are checkpoints of one training, told by their names.

Trainers name what they save along the way by its place: `epoch-0000100`, `checkpoint-2000`,
`steps300`. Anchors whose names differ in such a number alone, and that agree in beta, are
checkpoints of one training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

PLACE = re.compile(r"(epoch|checkpoint|ckpt|iteration|iter|step)s?[-_=]*(\d+)", re.IGNORECASE)


class Place(NamedTuple):
    """Where in a training an anchor was saved.

    Attributes:
        training: the anchor's name, with `#` in place of the number.
        number: of the epoch or step.
    """

    training: str
    number: int


def place_of(anchor: str) -> Place | None:
    """The place that an anchor's name tells; None where it tells none.

    Args:
        anchor: as the manifest names it. The last number counts: a run of 300 steps may lie in a
            folder of an epoch.
    """
    found = list(PLACE.finditer(anchor))
    if not found:
        return None
    start, end = found[-1].span(2)
    return Place(f"{anchor[:start]}#{anchor[end:]}", int(anchor[start:end]))


def trainings(betas: Mapping[str, float | None]) -> list[dict[int, str]]:
    """The trainings of which there are several checkpoints.

    Args:
        betas: of each anchor, by its name; None: unknown.

    Returns:
        For each training its anchors by the number of their place, in ascending order.
    """
    groups: dict[tuple[str, float | None], dict[int, str]] = {}
    for anchor, beta in betas.items():
        place = place_of(anchor)
        if place is not None:
            groups.setdefault((place.training, beta), {})[place.number] = anchor
    return [dict(sorted(group.items())) for group in groups.values() if len(group) > 1]


def earlier_checkpoints(betas: Mapping[str, float | None]) -> set[str]:
    """The anchors of which there is a later checkpoint of the same training.

    Args:
        betas: as `trainings` takes them.
    """
    earlier: set[str] = set()
    for checkpoints in trainings(betas):
        *before, _ = checkpoints.values()
        earlier.update(before)
    return earlier
