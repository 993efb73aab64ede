"""Which images stand for which: every realigned model and the model that was aligned from scratch at the beta it targets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from deradiff.anchors.anchor import AnchorCard
from deradiff.evaluation.manifest import SAMPLING_COLUMNS

GROUP = [*SAMPLING_COLUMNS, "anchor", "mode", "lam"]
ANCHOR = GROUP.index("anchor")
Group = tuple[Any, ...]  # values of GROUP: one model's images, sampled in one way
BETA_TOLERANCE = 1e-3  # relative; lam is often typed as .3333


def short(anchor: str) -> str:
    """An anchor's name for people: of its training run where it lies in one."""
    path = Path(anchor)
    return path.parent.name if path.name == "anchor" else anchor


@dataclass(frozen=True)
class Cell:
    """One entry of the paper's tables: anchor `beta` realigned by `lam` beside the target, from scratch at beta / lam.

    Each group is compared on the (prompt_id, seed) that it shares with the target and the reference: same x_T, same step noise.
    """

    beta: float
    beta_target: float
    lam: float
    mode: str
    bench: tuple[Any, ...]
    training_seed: int | None
    realigned: Group
    target: Group
    reference: Group
    anchor: Group | None  # the anchor as it is, lam = 1
    second_seeds: tuple[Group, ...]  # the target again, from other training seeds

    def __str__(self) -> str:
        return f"{short(self.realigned[ANCHOR])} at lam={self.lam:g}, mode {self.mode}, for beta={self.beta_target:g}"

    def rivals(self) -> list[tuple[str, Group]]:
        """What is held against the target, by name."""
        as_is = [("anchor as is", self.anchor)] if self.anchor else []
        floor = [("seed floor", group) for group in self.second_seeds]
        return [("realigned", self.realigned), *as_is, ("reference as is", self.reference), *floor]


def pair_up(samples: pd.DataFrame, cards: dict[str, AnchorCard]) -> tuple[list[Cell], list[str]]:
    """The cells of the realigned samples, whose targets may be any of the samples, and for each that lacks one a sentence that says so.

    Raises ValueError where two anchors could be the same target, as they agree in beta and training seed.
    """
    cells, missing = [], []
    for bench, images in samples.groupby(SAMPLING_COLUMNS):
        models = images.drop_duplicates(GROUP).sort_values(
            ["beta", "lam", "mode"]
        )  # a model of samples and references is of the former
        ends = {lam: _by_anchor(models[models["lam"] == lam]) for lam in (0, 1)}
        betas = {a: b for a, b in zip(models["anchor"], models["beta"]) if not pd.isna(b)}
        for model in models[models["realigned"] & ~models["lam"].isin([0, 1])].to_dict("records"):
            found = _cell(model, tuple(bench), betas, ends[0], ends[1], cards)
            if isinstance(found, Cell):
                alone, all_ = _without_partner(found, images)
                if alone:
                    missing.append(
                        f"{found}: {alone} of {all_} realigned images have no partner of the same prompt and seed, and are left out"
                    )
                if alone < all_:
                    cells.append(found)
            else:
                missing.append(found)
    return cells, missing


def _without_partner(cell: Cell, images: pd.DataFrame) -> tuple[int, int]:
    """How many realigned images the target or the reference has no image to compare with for, and of how many."""
    ids = {
        group: set(zip(rows["prompt_id"], rows["seed"])) for group, rows in images.groupby(GROUP)
    }
    own = ids[cell.realigned]
    return len(own - (ids[cell.target] & ids[cell.reference])), len(own)


def _cell(
    model: dict[str, Any],
    bench: tuple[Any, ...],
    betas: dict[str, float],
    references: dict[str, Group],
    anchors: dict[str, Group],
    cards: dict[str, AnchorCard],
) -> Cell | str:
    """The cell of one realigned model, or what it lacks. references, anchors: the groups at lam = 0 and at lam = 1, by anchor."""
    anchor, lam = model["anchor"], model["lam"]
    told = f"{short(anchor)} at lam={lam:g}, mode {model['mode']},"
    if anchor not in betas:
        return f"{told} has no target: its anchor names no beta"
    beta = betas[anchor]
    told = f"{told} targets beta={beta / lam:g}"
    fits = [
        a
        for a, b in betas.items()
        if a != anchor
        and a in anchors
        and _comparable(a, anchor, cards)
        and math.isclose(b, beta / lam, rel_tol=BETA_TOLERANCE)
    ]
    if not fits:
        return f"{told}: no sample run of an anchor at that beta, with 1 among its lambdas, is among the samples"
    target, *others = _by_training_seed(fits, anchor, cards)
    sources = [
        a
        for a in (target, anchor, *references)
        if a in references and _comparable(a, target, cards)
    ]
    if not sources:
        return f"{told}: no images of the reference are among the samples; sample with 0 among the lambdas"
    return Cell(
        beta=beta,
        beta_target=betas[target],
        lam=lam,
        mode=model["mode"],
        bench=bench,
        training_seed=_seed(anchor, cards),
        realigned=tuple(model[key] for key in GROUP),
        target=anchors[target],
        reference=references[sources[0]],
        anchor=anchors.get(anchor),
        second_seeds=tuple(anchors[a] for a in others),
    )


def _by_anchor(models: pd.DataFrame) -> dict[str, Group]:
    """One group an anchor; at lam = 0 and 1 every mode gives the same images, so the first serves."""
    return {
        model["anchor"]: tuple(model[key] for key in GROUP)
        for model in reversed(models.to_dict("records"))
    }


def _seed(anchor: str, cards: dict[str, AnchorCard]) -> int | None:
    return cards[anchor].seed if anchor in cards else None


def _comparable(one: str, other: str, cards: dict[str, AnchorCard]) -> bool:
    """Whether two anchors were aligned from one base in one way, as far as their cards tell."""
    if one not in cards or other not in cards:
        return True
    a, b = cards[one], cards[other]
    return (a.base_model, a.method, a.objective) == (b.base_model, b.method, b.objective)


def _by_training_seed(fits: list[str], anchor: str, cards: dict[str, AnchorCard]) -> list[str]:
    """The target that shares the anchor's training seed first: then both saw the same data in the same order."""
    seeds = [_seed(a, cards) for a in fits]
    if len(set(seeds)) < len(seeds):
        raise ValueError(
            f"{' and '.join(short(a) for a in fits)} agree in beta and training seed, so either could be the target; evaluate them apart"
        )
    return sorted(
        fits, key=lambda a: (_seed(a, cards) != _seed(anchor, cards), _seed(a, cards) or 0)
    )


def by_group(scores: pd.DataFrame) -> dict[Group, pd.DataFrame]:
    """The scores of each model: rows (prompt_id, seed), a column a scorer, in the order they were scored."""
    wide = scores.pivot_table(
        index=[*GROUP, "prompt_id", "seed"],
        columns="scorer",
        values="score",
        aggfunc="first",
        sort=False,
    )
    return {group: rows.droplevel(GROUP) for group, rows in wide.groupby(level=GROUP, sort=False)}


def per_prompt(
    groups: dict[Group, pd.DataFrame], chosen: list[Group], scorer: str
) -> tuple[pd.DataFrame, int]:
    """Mean scores over seeds, a row a prompt and a column a group, of the images that all groups share; and how many those are."""
    shared = pd.concat(
        [groups[group][scorer] for group in chosen], axis=1, join="inner", keys=range(len(chosen))
    )
    return shared.groupby(level="prompt_id", sort=True).mean(), len(shared)
