"""What `dial.lam` is set to for one of a config's lambdas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deradiff.method.branches import ByBranch
from deradiff.method.lambdas import piecewise, ramp
from sample.config import SampleConfig
from sample.manifest import Lams


def dial_value(lams: Lams, config: SampleConfig) -> Any:
    """The value of `dial.lam`.

    Args:
        lams: lambda of each anchor.
        config: says how it changes in time, and on which branch of guidance it acts.
    """
    values = []
    for lam in lams:
        values.append(of_branch(scheduled(lam, config.lam_schedule), config.branch))
    return values[0] if len(values) == 1 else values


def scheduled(lam: float, schedule: Sequence[Any]) -> float | Callable[[float], float]:
    """A lambda times a schedule.

    Args:
        lam: the lambda.
        schedule: a factor at pure noise and one at the image, with a line in time between them; or
            (fraction of time, factor), each valid until the next; empty: no schedule.

    Raises:
        ValueError: for fractions of time that do not rise from 0.
    """
    if not schedule or lam == 0:
        return lam
    if isinstance(schedule[0], Sequence):
        return piecewise([(fraction, lam * factor) for fraction, factor in schedule])
    start, end = schedule
    return ramp(lam * start, lam * end)


def of_branch(lam: Any, branch: str) -> Any:
    """A lambda for one branch of guidance; the other branch is the reference's.

    Args:
        lam: the lambda, or its schedule.
        branch: one of `deradiff.realignment.registry.BRANCHES`.
    """
    if branch == "both":
        return lam
    if branch == "conditional":
        return ByBranch(conditional=lam, unconditional=0.0)
    return ByBranch(conditional=0.0, unconditional=lam)
