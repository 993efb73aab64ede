"""Choosing lambda: the best held-out score under a path-KL budget, and an alarm for reward hacking.

Arrays in, numbers out. A candidate is one lambda of one anchor. It is chosen on some prompts and
reported on others, so that what is reported was not picked for being high. The path KL of a run
costs nothing more (`deradiff.realignment.path_kl`), so the budget needs no extra model.

Shapes: P prompts, C candidates, K scores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from deradiff.evaluation.statistics import LEVEL, UNKNOWN, Array, Estimate, paired_bootstrap

CHOOSING_SHARE = 0.5
"""About so many of the prompts choose; the others report."""

POWER = 0.8
"""How often two candidates are told apart, with the prompts that are said to be enough."""


def choosing_mask(prompt_ids: Sequence[str], share: float = CHOOSING_SHARE) -> NDArray[np.bool_]:
    """Which prompts choose; the others report.

    It follows from a hash of the prompt_id alone: a prompt falls on the same side in every run,
    whatever stands beside it and in which order.

    Args:
        prompt_ids: P of them.
        share: about so many of them choose, in [0, 1].

    Returns:
        (P,), True for prompts to choose by.
    """
    numbers = [_uniform_number(prompt_id) for prompt_id in prompt_ids]
    return np.array(numbers, dtype=np.float64) < share


def _uniform_number(text: str) -> float:
    """A number in [0, 1) that a text stands for."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64


@dataclass(frozen=True)
class Choice:
    """A candidate, and what it is worth on the prompts that did not choose it.

    Attributes:
        index: of the candidate.
        affordable: (C,), whether its mean path KL is within the budget.
        path_kl: (C,), mean path KL in nats.
        choosing_means: (C,), mean scores on the choosing prompts.
        score: the chosen candidate's mean score.
        gain: that score above the reference's, paired.
        lead: that score above the next best affordable candidate's, paired; nan where there is
            none. An interval that holds 0 says that the two are not told apart.
    """

    index: int
    affordable: NDArray[np.bool_]
    path_kl: Array
    choosing_means: Array
    score: Estimate
    gain: Estimate
    lead: Estimate


def choose(
    scores: Array,
    path_kl: Array,
    budget: float | None,
    choosing: NDArray[np.bool_],
    reference: Array | None = None,
    seed: int = 0,
) -> Choice:
    """The affordable candidate with the highest mean score on the choosing prompts.

    Of equal candidates the one with the smaller path KL is chosen.

    Args:
        scores: (P, C), nan where a prompt lacks a candidate.
        path_kl: (P, C), in nats.
        budget: the largest mean path KL in nats; None: any. With a budget, a candidate without a
            path KL is not affordable.
        choosing: (P,), as `choosing_mask` makes it.
        reference: (P,), the reference's scores; None: unknown.
        seed: of the draws.

    Raises:
        ValueError: where no candidate is affordable, or one side of the split holds no prompt.
    """
    if not choosing.any() or choosing.all():
        raise ValueError(
            f"{len(choosing)} prompts do not make two halves, one to choose lambda by and one to "
            "report on: sample more prompts"
        )

    # The candidates within the budget
    mean_kl = _column_means(path_kl)
    mean_scores = _column_means(scores[choosing])
    affordable = ~np.isnan(mean_scores)
    if budget is not None:
        affordable &= mean_kl <= budget
    if not affordable.any():
        raise ValueError(_budget_message(mean_kl, budget))

    def rank(candidate: int) -> tuple[float, float]:
        return -mean_scores[candidate], np.nan_to_num(mean_kl[candidate], nan=np.inf)

    # The best by the choosing prompts
    order = sorted(np.flatnonzero(affordable).tolist(), key=rank)
    best = order[0]

    # Its worth on the other prompts
    held_out = scores[~choosing]
    gain = UNKNOWN
    if reference is not None:
        gain = _mean_change(reference[~choosing], held_out[:, best], seed)
    lead = UNKNOWN
    if len(order) > 1:
        lead = _mean_change(held_out[:, order[1]], held_out[:, best], seed)
    return Choice(
        index=best,
        affordable=affordable,
        path_kl=mean_kl,
        choosing_means=mean_scores,
        score=paired_bootstrap(held_out[:, [best]], _only_column, seed),
        gain=gain,
        lead=lead,
    )


def _budget_message(mean_kl: Array, budget: float | None) -> str:
    """How the error says that no candidate is within the budget."""
    smallest = ", for none was recorded"
    if np.isfinite(mean_kl).any():
        smallest = f"; the smallest is {np.nanmin(mean_kl):.4g}"
    return (
        f"no lambda has a mean path KL within {budget:g} nats{smallest}: raise the budget or "
        "sample smaller lambdas"
    )


def _column_means(values: Array) -> Array:
    """The means of columns; nan where a column is empty."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=0) / (~np.isnan(values)).sum(axis=0)


def _only_column(means: Array) -> Array:
    """The statistic that is the mean of the only column itself."""
    return means[..., 0]


def _mean_change(before: Array, after: Array, seed: int, level: float = LEVEL) -> Estimate:
    """The mean of after - before over the prompts that have both."""
    difference = (after - before)[:, None]
    difference = difference[~np.isnan(difference[:, 0])]
    if not len(difference):
        return UNKNOWN
    return paired_bootstrap(difference, _only_column, seed, level)


def prompts_to_tell_apart(
    difference: float, deviation: float, share: float = CHOOSING_SHARE
) -> float:
    """How many prompts tell two candidates apart, choosing and reporting ones together.

    n prompts do so in 80 % of all cases where the mean difference is z_.975 + z_.8 of its standard
    errors, deviation / sqrt(n), from 0: its 95 % interval then lies on one side of 0.

    Args:
        difference: between the mean scores.
        deviation: the standard deviation of the paired difference over prompts.
        share: of the prompts that choose.

    Returns:
        A whole number; infinite where there is no difference, nan where one is not known.
    """
    if np.isnan(difference) or np.isnan(deviation):
        return np.nan
    if difference == 0:
        return np.inf
    errors = stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER)
    return float(np.ceil((errors * deviation / difference) ** 2 / share))


@dataclass(frozen=True)
class Alarm:
    """Whether there is reward hacking from one model to another.

    Attributes:
        rise: the change of the optimised score, with its 95 % interval.
        changes: of all K scores, the optimised one too. The intervals of the others are widened for
            their number.
        fallen: which of the others fell clearly.
        raised: the alarm: the optimised score rose clearly, and another one fell.
    """

    rise: Estimate
    changes: tuple[Estimate, ...]
    fallen: tuple[int, ...]
    raised: bool


def reward_hacking(before: Array, after: Array, optimised: int = 0, seed: int = 0) -> Alarm:
    """Whether the score that was optimised rises while another one falls.

    A change is clear where the bootstrap interval of its mean over prompts lies on one side of 0.
    The intervals of the K - 1 other scores hold at 95 % together (Bonferroni), so that more scorers
    do not make more false alarms.

    Args:
        before: (P, K), the scores of one model.
        after: (P, K), of the other, on the same prompts.
        optimised: the column of the score that alignment optimised.
        seed: of the draws.
    """
    # How far each score changes
    others = before.shape[1] - 1
    level_of_others = 1 - (1 - LEVEL) / max(others, 1)
    changes = []
    for column, (own_before, own_after) in enumerate(zip(before.T, after.T, strict=True)):
        level = LEVEL if column == optimised else level_of_others
        changes.append(_mean_change(own_before, own_after, seed, level))

    # Which of the others fell clearly
    fallen = []
    for column, change in enumerate(changes):
        if column != optimised and change.high < 0:
            fallen.append(column)
    rise = changes[optimised]
    return Alarm(rise, tuple(changes), tuple(fallen), bool(rise.low > 0 and fallen))
