"""Choosing lambda: the best held-out score under a path-KL budget, and an alarm for reward hacking.
Arrays in, numbers out.

A candidate is one lambda of one anchor. It is chosen on some prompts and reported on others, so
that what is reported was not picked for being high. The path KL of a run costs nothing more
(`deradiff.realignment.path_kl`), so the budget needs no extra model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deradiff.evaluation.statistics import LEVEL, Array, Estimate, paired_bootstrap


def for_choosing(prompt_ids: Sequence[str], share: float = 0.5) -> NDArray[np.bool_]:
    """(P,): True for prompts to choose by, False for prompts to report on; about `share` of them
    True.

    By a hash of the prompt_id alone: a prompt falls on the same side in every run, whatever stands
    beside it and in which order.
    """
    drawn = [
        int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64
        for text in prompt_ids
    ]
    return np.array(drawn, dtype=np.float64) < share


@dataclass(frozen=True)
class Choice:
    """Which candidate, and what it is worth on the prompts that did not choose it.

    index: of the candidate. affordable: (C,), whose mean path KL, path_kl (C,), is within the
        budget. chosen_by: (C,), mean scores on the choosing prompts. score: the chosen one's mean
        score; gain: above the reference's, paired; lead: above the next best affordable
        candidate's, paired (nan where there is none): an interval that holds 0 says that the two
        are not told apart.
    """

    index: int
    affordable: NDArray[np.bool_]
    path_kl: Array
    chosen_by: Array
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
    """The candidate with the highest mean score on the choosing prompts among those with a mean
    path KL of at most `budget` nats.

    scores, path_kl: (P, C), nan where a prompt lacks a candidate. budget: None for any; else a
    candidate without a path KL is not affordable. choosing: (P,), as `for_choosing` makes it.
    reference: (P,), the reference's scores. Of equal candidates the one with the smaller path KL is
    chosen. Raises ValueError where no candidate is affordable, or one side of the split holds no
    prompt.
    """
    if not choosing.any() or choosing.all():
        raise ValueError(
            f"{len(choosing)} prompts do not make two halves, one to choose lambda by and one to "
            f"report on: sample more prompts"
        )
    kl, means = _means(path_kl), _means(scores[choosing])
    affordable = ~np.isnan(means) & (np.ones(len(kl), bool) if budget is None else kl <= budget)
    if not affordable.any():
        least = (
            f"; the smallest is {np.nanmin(kl):.4g}"
            if np.isfinite(kl).any()
            else ", for none was recorded"
        )
        raise ValueError(
            f"no lambda has a mean path KL within {budget:g} nats{least}: raise the budget or "
            f"sample smaller lambdas"
        )
    order = sorted(
        np.flatnonzero(affordable), key=lambda c: (-means[c], np.nan_to_num(kl[c], nan=np.inf))
    )
    best, held = int(order[0]), scores[~choosing]
    nothing = Estimate(np.nan, np.nan, np.nan)
    return Choice(
        index=best,
        affordable=affordable,
        path_kl=kl,
        chosen_by=means,
        score=paired_bootstrap(held[:, [best]], lambda m: m[..., 0], seed),
        gain=nothing if reference is None else _change(reference[~choosing], held[:, best], seed),
        lead=_change(held[:, order[1]], held[:, best], seed) if len(order) > 1 else nothing,
    )


def _means(values: Array) -> Array:
    """Means of the columns, nan where a column is empty."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=0) / (~np.isnan(values)).sum(axis=0)


def _change(before: Array, after: Array, seed: int, level: float = LEVEL) -> Estimate:
    """Mean of after - before over the prompts that have both."""
    difference = (after - before)[:, None]
    difference = difference[~np.isnan(difference[:, 0])]
    return (
        paired_bootstrap(difference, lambda m: m[..., 0], seed, level)
        if len(difference)
        else Estimate(np.nan, np.nan, np.nan)
    )


@dataclass(frozen=True)
class Alarm:
    """Reward hacking from one model to another. rise: change of the optimised score, 95 %. changes:
    of all K scores, the optimised one too, the others' intervals widened for their number. fallen:
    which others fell clearly. raised: the optimised one rose clearly, and any fell.
    """

    rise: Estimate
    changes: tuple[Estimate, ...]
    fallen: tuple[int, ...]
    raised: bool


def reward_hacking(before: Array, after: Array, optimised: int = 0, seed: int = 0) -> Alarm:
    """Whether the score that was optimised rises while another one falls, from `before` to `after`,
    each (P, K), paired by prompt.

    Clearly: the bootstrap interval of the mean change over prompts lies on one side of 0; those of
        the K - 1 others at 95 % together (Bonferroni), so that more scorers do not make more false
        alarms. optimised: the column of the score that alignment optimised.
    """
    others = before.shape[1] - 1
    level = 1 - (1 - LEVEL) / max(others, 1)
    changes = [
        _change(b, a, seed, LEVEL if k == optimised else level)
        for k, (b, a) in enumerate(zip(before.T, after.T, strict=True))
    ]
    fallen = tuple(k for k, change in enumerate(changes) if k != optimised and change.high < 0)
    return Alarm(
        changes[optimised], tuple(changes), fallen, bool(changes[optimised].low > 0 and fallen)
    )
