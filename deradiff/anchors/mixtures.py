"""Several anchors as one: what their mixture is called, and which model it imitates.

Anchors i with lambda_i sample from p_ref^(1 - sum lambda_i) prod p_i^(lambda_i). With lam the sum
of |lambda_i| and shares w_i = lambda_i / lam, this is p_ref^(1 - lam sum w_i) (prod p_i^(w_i))^lam:
lambda is turned to lam on one anchor, the mixture of the anchors in these shares.

An anchor of DPO at beta_i on a reward r_i is p_ref exp(r_i / beta_i), normalised. So the mixture is
the model that was aligned on the reward sum_i w_i (beta / beta_i) r_i at beta / lam, where
1 / beta = sum w_i / beta_i.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

DECIMALS = 12
"""Sums of lambdas that people type agree to so many decimals, and are rounded to these."""

MIXTURE_PART = re.compile(r"(-?[\d.e-]+) (.+)")
BETWEEN_PARTS = " + "


class MixedAnchor(NamedTuple):
    """A realigned model of one or several anchors, as a model of one anchor.

    Attributes:
        anchor: its name: of the anchor, or of the mixture.
        lam: lambda of it.
        shares: of the mixture's anchors, by name; None: it is one anchor.
    """

    anchor: str
    lam: float
    shares: dict[str, float] | None = None

    @property
    def is_anchor(self) -> bool:
        """Whether it is an anchor as it was trained."""
        return self.shares is None and self.lam == 1


def as_one_anchor(anchors: Sequence[str], lams: Sequence[float]) -> MixedAnchor:
    """The realigned model of several anchors, as a model of one.

    Where all lambdas are 0 it is the reference, under the name of the first anchor. Where one is
    not, it is that anchor's.

    Args:
        anchors: their names.
        lams: lambda of each.
    """
    used = [(anchor, lam) for anchor, lam in zip(anchors, lams, strict=True) if lam != 0]
    if not used:
        return MixedAnchor(anchors[0], 0.0)
    if len(used) == 1:
        return MixedAnchor(*used[0])
    total = round(sum(abs(lam) for _, lam in used), DECIMALS)
    shares = {anchor: round(lam / total, DECIMALS) for anchor, lam in used}
    return MixedAnchor(mixture_name(shares), total, shares)


def mixture_name(shares: Mapping[str, float]) -> str:
    """The name of a mixture, such as `0.25 a + 0.75 b`.

    Args:
        shares: by the anchors' names.
    """
    return BETWEEN_PARTS.join(f"{share:.4g} {anchor}" for anchor, share in shares.items())


def parts_of(name: str) -> list[tuple[str, str]] | None:
    """The shares and anchors of a mixture's name, as they are written; None: it is no mixture.

    Args:
        name: of an anchor or a mixture.
    """
    parts = []
    for part in name.split(BETWEEN_PARTS):
        match = MIXTURE_PART.fullmatch(part)
        if match is None:
            return None
        parts.append((match[1], match[2]))
    return parts if len(parts) > 1 else None


def anchor_name(anchor: str) -> str:
    """An anchor's name for people: of its training run where it lies in one.

    Args:
        anchor: as the manifest names it; a mixture is named by the names of its anchors.
    """
    parts = parts_of(anchor)
    if parts:
        return BETWEEN_PARTS.join(f"{share} {anchor_name(part)}" for share, part in parts)
    path = Path(anchor)
    return path.parent.name if path.name == "anchor" else anchor


def lam_text(anchor: str, lam: float) -> str:
    """Lambda for people: of a mixture that of each anchor, such as `0.7, 0.3`.

    Args:
        anchor: of an anchor or a mixture.
        lam: lambda of it.
    """
    parts = parts_of(anchor)
    if parts is None:
        return f"{lam:.4g}"
    return ", ".join(f"{float(share) * lam:.4g}" for share, _ in parts)


def short_names(anchors: Sequence[str]) -> list[str]:
    """The names of anchors for people, without what all of them begin or end with.

    Args:
        anchors: as the manifest names them.
    """
    names = [anchor_name(anchor).split("-") for anchor in anchors]
    if len(names) < 2:
        return ["-".join(name) for name in names]
    shortest = min(map(len, names))
    start = 0
    while start < shortest - 1 and len({name[start] for name in names}) == 1:
        start += 1
    end = 0
    while end < shortest - 1 - start and len({name[-1 - end] for name in names}) == 1:
        end += 1
    return ["-".join(name[start : len(name) - end]) for name in names]


def mixed_beta(shares: Mapping[str, float], betas: Mapping[str, float | None]) -> float | None:
    """The beta of a mixture: 1 / beta = sum w_i / beta_i.

    Args:
        shares: of its anchors, by name.
        betas: of these anchors; None: unknown.

    Returns:
        None where it is unknown, or where an anchor is subtracted.
    """
    inverse = 0.0
    for anchor, share in shares.items():
        beta = betas.get(anchor)
        if beta is None or share < 0:
            return None
        inverse += share / beta
    return 1 / inverse


def mixed_reward(
    shares: Mapping[str, float],
    betas: Mapping[str, float | None],
    rewards: Mapping[str, Mapping[str, float] | None],
) -> dict[str, float] | None:
    """What a mixture was aligned on: the weight of each reward over beta, at lam = 1.

    Args:
        shares: of its anchors, by name.
        betas: of these anchors; None: unknown.
        rewards: the weights of the scorers that each anchor's reward is made of; None: unknown.

    Returns:
        sum_i w_i / beta_i times the weight in r_i, by scorer; None where something is unknown.
    """
    strengths: dict[str, float] = {}
    for anchor, share in shares.items():
        beta = betas.get(anchor)
        reward = rewards.get(anchor)
        if beta is None or reward is None:
            return None
        for scorer, weight in reward.items():
            strengths[scorer] = strengths.get(scorer, 0.0) + share * weight / beta
    return strengths
