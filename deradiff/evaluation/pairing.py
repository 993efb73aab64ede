"""Which images are compared: every realigned model, and the model it should imitate.

The target of a realigned model is the model that was aligned from scratch at beta / lam.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from deradiff.anchors.anchor import AnchorCard
from deradiff.anchors.mixtures import anchor_name, mixed_reward
from deradiff.evaluation.checkpoints import earlier_checkpoints
from deradiff.evaluation.manifest import SAMPLING_COLUMNS

BETA_TOLERANCE = 1e-3
"""Relative. lam is often typed as .3333."""

COMPARABLE = ("base_model", "method", "objective", "beta_convention")
"""What the cards of two anchors agree in where one may be the other's target."""

Cards = Mapping[str, AnchorCard]
"""The cards of anchors, by the manifest's `anchor`."""


class SampledModel(NamedTuple):
    """One model's images, sampled in one way. A key of tables and dictionaries.

    Attributes:
        sampler: how it was sampled, with the next five.
        eta: of DDIM.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance.
        height: in pixels.
        width: in pixels.
        anchor: as the manifest names it.
        mode: the mode's label.
        lam: lambda.
    """

    sampler: str
    eta: float
    steps: int
    guidance_scale: float
    height: int
    width: int
    anchor: str
    mode: str
    lam: float

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> SampledModel:
        """The model of a manifest's line, or of a table's row that has these columns."""
        return cls(*(row[column] for column in cls._fields))

    @property
    def sampling(self) -> tuple[Any, ...]:
        """How it was sampled: the values of `SAMPLING_COLUMNS`."""
        return tuple(self)[: len(SAMPLING_COLUMNS)]

    @property
    def is_reference(self) -> bool:
        """Whether it is the reference."""
        return self.lam == 0

    def is_weaker_than(self, other: SampledModel) -> bool:
        """Whether it is on the way from the reference to another model: a smaller lambda of it.

        The reference is on the way to every anchor that was sampled alike.
        """
        same_source = (self.anchor, self.mode) == (other.anchor, other.mode)
        is_between = 0 <= self.lam < other.lam or other.lam < self.lam <= 0
        is_smaller = self.sampling == other.sampling and is_between
        return is_smaller and (self.is_reference or same_source)


MODEL_COLUMNS = list(SampledModel._fields)
"""The columns of a table that tell a sampled model."""


@dataclass(frozen=True)
class Cell:
    """One entry of the paper's tables: a realigned model and its target.

    Models are compared on the (prompt_id, seed) that they share with the target and the reference:
    same initial noise, same step noise.

    Attributes:
        beta: the anchor's.
        beta_target: the target's, beta / lam.
        lam: lambda.
        mode: the mode's label.
        sampling: values of `SAMPLING_COLUMNS`.
        training_seed: the anchor's; None where no card says it.
        realigned: the realigned model.
        target: the model that was aligned from scratch.
        reference: the reference.
        anchor: the anchor as it is, lam = 1; None where it was not sampled.
        second_seeds: the target again, from other training seeds.
        is_mixture: whether it is a mixture of several anchors, whose target was aligned on the
            mixed reward.
    """

    beta: float
    beta_target: float
    lam: float
    mode: str
    sampling: tuple[Any, ...]
    training_seed: int | None
    realigned: SampledModel
    target: SampledModel
    reference: SampledModel
    anchor: SampledModel | None
    second_seeds: tuple[SampledModel, ...]
    is_mixture: bool = False

    def __str__(self) -> str:
        name = anchor_name(self.realigned.anchor)
        return f"{name} at lam={self.lam:g}, mode {self.mode}, for beta={self.beta_target:g}"

    def comparisons(self) -> list[tuple[str, SampledModel]]:
        """What is compared with the target, by name: the realigned model, and what it must beat."""
        compared = [("realigned", self.realigned)]
        if self.anchor:
            compared.append(("anchor as is", self.anchor))
        compared.append(("reference as is", self.reference))
        compared += [("seed floor", model) for model in self.second_seeds]
        return compared

    def key(self) -> tuple[SampledModel, float, str]:
        """What cells of several modes share: target, lambda and anchor."""
        return self.target, self.lam, self.realigned.anchor


class Pairs(NamedTuple):
    """Which models are compared with which.

    Attributes:
        cells: every realigned model of one anchor, with its target.
        mixtures: every mixture of several anchors whose target was sampled, with its target.
        missing: sentences that say what could not be compared, and why.
    """

    cells: list[Cell]
    mixtures: list[Cell]
    missing: list[str]


def pair_up(samples: pd.DataFrame, cards: Cards) -> Pairs:
    """The cells of all realigned models.

    Args:
        samples: of `read_samples`. A target may be any of them.
        cards: of their anchors.

    Raises:
        ValueError: where two anchors could be the same target, because they agree in beta and
            training seed.
    """
    pairs = Pairs([], [], [])
    with_others = _with_others(samples)
    for _, images in samples.groupby(SAMPLING_COLUMNS):
        group = _SameSampling.of(images, cards, with_others)
        for model in group.realigned_models():
            cell = group.find_cell(model)
            if cell is None:
                continue
            if isinstance(cell, str):
                pairs.missing.append(cell)
                continue
            alone, total = _without_partner(cell, images)
            if alone:
                pairs.missing.append(
                    f"{cell}: {alone} of {total} realigned images have no partner of the same "
                    "prompt and seed, and are left out"
                )
            if alone < total:
                cells = pairs.mixtures if cell.is_mixture else pairs.cells
                cells.append(cell)
    return pairs


def _with_others(samples: pd.DataFrame) -> set[str]:
    """The anchors and mixtures beside which another anchor was sampled as it is.

    One that is mixed with them does not count. Without another, nobody asked for a target.
    """
    mixtures = samples[samples["shares"].notna()]
    families = {anchor: {anchor} for anchor in samples["anchor"]}
    for mixture, shares in dict(zip(mixtures["anchor"], mixtures["shares"])).items():
        families[mixture].update(shares)
        for anchor in shares:
            families.setdefault(anchor, {anchor}).update(shares)
    as_it_is = set(samples.loc[samples["is_own"] & (samples["lam"] == 1), "anchor"])
    return {anchor for anchor, family in families.items() if as_it_is - family}


def _without_partner(cell: Cell, images: pd.DataFrame) -> tuple[int, int]:
    """How many realigned images lack an image of target or reference, and of how many."""
    ids = {}
    for values, rows in images.groupby(MODEL_COLUMNS):
        ids[SampledModel(*values)] = set(zip(rows["prompt_id"], rows["seed"]))
    own = ids[cell.realigned]
    partners = ids[cell.target] & ids[cell.reference]
    return len(own - partners), len(own)


@dataclass(frozen=True)
class _SameSampling:
    """All models that were sampled in one way.

    Attributes:
        models: a row a model, sorted by beta, lambda and mode.
        betas: of each anchor or mixture that has one.
        shares: of each mixture's anchors.
        references: each anchor's model at lam = 0.
        anchors: each anchor's model at lam = 1.
        cards: of the anchors.
        with_others: see `_with_others`.
        earlier: anchors of which there is a later checkpoint. They are no targets: they were not
            trained to the end.
    """

    models: pd.DataFrame
    betas: dict[str, float]
    shares: dict[str, dict[str, float]]
    references: dict[str, SampledModel]
    anchors: dict[str, SampledModel]
    cards: Cards
    with_others: set[str]
    earlier: set[str]

    @classmethod
    def of(cls, images: pd.DataFrame, cards: Cards, with_others: set[str]) -> _SameSampling:
        """The models of images that were sampled in one way."""
        # A model of samples and of references counts as one of samples, which come first
        models = images.drop_duplicates(MODEL_COLUMNS).sort_values(["beta", "lam", "mode"])
        betas = {}
        for anchor, beta in zip(models["anchor"], models["beta"]):
            if not pd.isna(beta):
                betas[anchor] = beta
        mixtures = models[models["shares"].notna()]
        shares = dict(zip(mixtures["anchor"], mixtures["shares"]))
        own = models[models["is_own"]]
        references = _by_anchor(own[own["lam"] == 0])
        anchors = _by_anchor(own[own["lam"] == 1])
        earlier = earlier_checkpoints({anchor: betas.get(anchor) for anchor in anchors})
        return cls(models, betas, shares, references, anchors, cards, with_others, earlier)

    def realigned_models(self) -> list[dict[str, Any]]:
        """Models that are neither the reference nor an anchor as it is, which are no cells."""
        models = self.models
        return models[models["realigned"] & ~models["is_own"]].to_dict("records")

    def find_cell(self, model: dict[str, Any]) -> Cell | str | None:
        """The cell of one realigned model, or a sentence that says what it lacks.

        None for a mixture whose target nobody trained, and where no other anchor was sampled, so
        that nobody asked for a target.
        """
        anchor = model["anchor"]
        lam = model["lam"]
        is_mixture = anchor in self.shares
        name = f"{anchor_name(anchor)} at lam={lam:g}, mode {model['mode']},"
        if anchor not in self.with_others:
            return None
        if pd.isna(model["beta_target"]):
            return None if is_mixture else f"{name} has no target: {self._why_no_target(model)}"

        # The target: an anchor at beta / lam, sampled as it is
        beta = self.betas[anchor]
        name = f"{name} targets beta={beta / lam:g}"
        fitting = self._anchors_like(anchor, lam)
        if not fitting:
            missing = (
                f"{name}: no sample run of an anchor at that beta, with 1 among its lambdas, is "
                "among the samples"
            )
            return None if is_mixture else missing
        target, *others = self._by_training_seed(fitting, anchor)

        # The reference: the target's own where there is one
        sources = [
            source
            for source in (target, anchor, *self.references)
            if source in self.references
            and _comparable(self.cards.get(source), self.cards.get(target))
        ]
        if not sources:
            return (
                f"{name}: no images of the reference are among the samples; sample with 0 among "
                "the lambdas"
            )
        realigned = SampledModel.of_row(model)
        return Cell(
            beta=beta,
            beta_target=self.betas[target],
            lam=lam,
            mode=model["mode"],
            sampling=realigned.sampling,
            training_seed=_training_seed(anchor, self.cards),
            realigned=realigned,
            target=self.anchors[target],
            reference=self.references[sources[0]],
            anchor=self.anchors.get(anchor),
            second_seeds=tuple(self.anchors[other] for other in others),
            is_mixture=is_mixture,
        )

    def _why_no_target(self, model: Mapping[str, Any]) -> str:
        """Why one realigned model imitates no model that could be trained."""
        if model["anchor"] not in self.betas:
            return "its anchor names no beta"
        if model["lam"] < 0:
            return "its lam is negative"
        return "its lam is not the same at all times and in all branches of guidance"

    def _anchors_like(self, source: str, lam: float) -> list[str]:
        """Other anchors, sampled as they are, that a source at a lambda should imitate.

        They were aligned from the same base in the same way, at beta / lam, on the same reward. A
        reward that no card names may be any; but not that of a mixture.
        """
        own_cards = [self.cards.get(anchor) for anchor in self.shares.get(source, [source])]
        own_reward = self._reward(source)
        fitting = []
        for anchor in self.anchors:
            if anchor == source or anchor not in self.betas or anchor in self.earlier:
                continue
            reward = self._reward(anchor)
            if own_reward is not None and reward is not None:
                is_close = _are_close(own_reward, lam, reward)
            else:
                beta = self.betas[source] / lam
                is_close = math.isclose(self.betas[anchor], beta, rel_tol=BETA_TOLERANCE)
                is_close = is_close and source not in self.shares
            card = self.cards.get(anchor)
            if is_close and all(_comparable(card, own_card) for own_card in own_cards):
                fitting.append(anchor)
        return fitting

    def _reward(self, source: str) -> dict[str, float] | None:
        """The weights over beta of the rewards that a source was aligned on; None: unknown."""
        shares = self.shares.get(source, {source: 1.0})
        betas = {}
        rewards = {}
        for anchor in shares:
            card = self.cards.get(anchor)
            betas[anchor] = card.beta if card else None
            rewards[anchor] = card.reward if card else None
        return mixed_reward(shares, betas, rewards)

    def _by_training_seed(self, fitting: list[str], anchor: str) -> list[str]:
        """The target that shares the anchor's training seed first.

        Then both saw the same data in the same order.
        """
        seeds = [_training_seed(one, self.cards) for one in fitting]
        if len(set(seeds)) < len(seeds):
            names = " and ".join(anchor_name(one) for one in fitting)
            raise ValueError(
                f"{names} agree in beta and training seed, so either could be the target; evaluate "
                "them apart"
            )
        own_seed = _training_seed(anchor, self.cards)

        def order(one: str) -> tuple[bool, int]:
            seed = _training_seed(one, self.cards)
            return seed != own_seed, seed or 0

        return sorted(fitting, key=order)


def _by_anchor(models: pd.DataFrame) -> dict[str, SampledModel]:
    """One model an anchor. At lam = 0 and 1 every mode gives the same images: the first serves."""
    first: dict[str, SampledModel] = {}
    for model in reversed(models.to_dict("records")):
        first[model["anchor"]] = SampledModel.of_row(model)
    return first


def _training_seed(anchor: str, cards: Cards) -> int | None:
    return cards[anchor].seed if anchor in cards else None


def _comparable(one: AnchorCard | None, other: AnchorCard | None) -> bool:
    """Whether two anchors were aligned from one base in one way, as far as their cards tell."""
    if one is None or other is None:
        return True
    return all(getattr(one, name) == getattr(other, name) for name in COMPARABLE)


def _are_close(reward: Mapping[str, float], lam: float, other: Mapping[str, float]) -> bool:
    """Whether lam times the weights of a reward are those of another one."""
    for scorer in {*reward, *other}:
        weight = lam * reward.get(scorer, 0.0)
        if not math.isclose(weight, other.get(scorer, 0.0), rel_tol=BETA_TOLERANCE):
            return False
    return True


def by_model(scores: pd.DataFrame) -> dict[SampledModel, pd.DataFrame]:
    """The scores of each model.

    Args:
        scores: a row per image and scorer.

    Returns:
        For each model, rows (prompt_id, seed) and a column a scorer, in the order of scoring.
    """
    wide = scores.pivot_table(
        index=[*MODEL_COLUMNS, "prompt_id", "seed"],
        columns="scorer",
        values="score",
        aggfunc="first",
        sort=False,
    )
    models = {}
    for values, rows in wide.groupby(level=MODEL_COLUMNS, sort=False):
        models[SampledModel(*values)] = rows.droplevel(MODEL_COLUMNS)
    return models


def per_prompt(
    scores: Mapping[SampledModel, pd.DataFrame], models: Sequence[SampledModel], scorer: str
) -> tuple[pd.DataFrame, int]:
    """Mean scores over seeds, of the images that all models share.

    Args:
        scores: of `by_model`.
        models: what is compared.
        scorer: whose scores.

    Returns:
        A row a prompt and a column a model; and how many images that is of.
    """
    columns = [scores[model][scorer] for model in models]
    shared = pd.concat(columns, axis=1, join="inner", keys=range(len(models)))
    return shared.groupby(level="prompt_id", sort=True).mean(), len(shared)
