"""Which lambda: the best score without a reward-hacking alarm, under a path-KL budget.

It is chosen on one half of the prompts and reported on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from deradiff.anchors.mixtures import anchor_name, lam_text
from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import MODEL_COLUMNS, SampledModel
from deradiff.evaluation.selection import (
    Choice,
    choose,
    choosing_mask,
    prompts_to_tell_apart,
    reward_hacking,
)
from deradiff.evaluation.statistics import Array, Estimate, paired_bootstrap
from deradiff.evaluation.tables.table import (
    LAM,
    NO_ESTIMATE,
    NOT_THERE,
    SAMPLED,
    Column,
    ResultTable,
    Row,
    interval,
    number,
)

FEWEST_PROMPTS = 2
"""Prompts to choose by, and as many to report on: of one there is no interval."""

NOTE = """Chosen: the largest mean {score} over the choosing prompts{budget}, of the models without
an alarm; where others cannot be told apart from it on these prompts, the smallest path KL of them,
or the smallest lam where a path KL is not known. All other numbers are of the held-out prompts:
{choosing} and {reporting} prompts, split by a hash of their text. Below the chosen: the paired
difference. Prompts to tell it: how many, choosing and reporting ones together, would tell it from
the chosen at 95 % in 80 % of all cases, were the two as far apart as the held-out prompts say; at
least: were they as far apart as the farther end of that interval. Alarm: the scores that have
fallen from their own best at a smaller lambda of that anchor, by an interval below 0 that allows
for their number, while {score} has risen: reward hacking. Brackets: 95 % bootstrap intervals over
prompts."""


@dataclass(frozen=True)
class Answer:
    """The answer to *which lambda*.

    Attributes:
        table: every candidate.
        sentence: the chosen one, what was passed over for an alarm, and what cannot be told apart.
        alarm: the scorers that fall at the best score, where that is not chosen for it, or is
            for want of another.
    """

    table: ResultTable
    sentence: str
    alarm: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidates:
    """The candidates' scores on the prompts that all of them share.

    Attributes:
        models: the candidates.
        paired: by scorer, a row a prompt and a column a candidate.
        score: the scorer to choose by.
        choosing: (P,), True for the prompts to choose by.
    """

    models: Sequence[SampledModel]
    paired: dict[str, pd.DataFrame]
    score: str
    choosing: NDArray[np.bool_]

    @property
    def others(self) -> list[str]:
        """The scorers that lambda is not chosen by."""
        return [scorer for scorer in self.paired if scorer != self.score]

    def reported(self, scorer: str, columns: list[int]) -> Array:
        """Scores of candidates on the reporting prompts."""
        return self.paired[scorer].loc[~self.choosing, columns].to_numpy()

    def choosing_mean(self, scorer: str, candidate: int) -> float:
        """The mean score of a candidate on the choosing prompts."""
        return self.paired[scorer].loc[self.choosing, candidate].mean()

    def difference(self, one: int, other: int) -> Estimate:
        """The chosen score of one candidate above another's, on the reporting prompts."""
        return paired_bootstrap(self.reported(self.score, [one, other]), _first_less_second)

    def prompts_to_tell(self, one: int, other: int) -> tuple[float, float]:
        """How many prompts, of both halves, tell two candidates apart.

        Returns:
            By the difference on the reporting prompts; and by the end of its interval that is
            farther from 0: so many at the least.
        """
        scores = self.reported(self.score, [one, other])
        deviation = float(np.std(scores[:, 0] - scores[:, 1], ddof=1))
        difference = self.difference(one, other)
        farthest = max(abs(difference.low), abs(difference.high))
        return (
            prompts_to_tell_apart(difference.value, deviation),
            prompts_to_tell_apart(farthest, deviation),
        )

    def is_alike(self, best: int, other: int) -> bool:
        """Whether the choosing prompts do not tell a candidate from the best one."""
        if best == other:
            return True
        scores = self.paired[self.score].loc[self.choosing, [best, other]].to_numpy()
        return not paired_bootstrap(scores, _first_less_second).low > 0

    def reference_of(self, candidate: int) -> int | None:
        """The candidate that is the reference, sampled as another candidate is."""
        sampling = self.models[candidate].sampling
        for index, model in enumerate(self.models):
            if model.is_reference and model.sampling == sampling:
                return index
        return None


def _first_less_second(means: Array) -> Array:
    return means[..., 0] - means[..., 1]


def _first(means: Array) -> Array:
    return means[..., 0]


def select(comparison: Comparison) -> Answer:
    """The best of the realigned samples by `options.score`, within the path-KL budget.

    Models of `references` are no candidates. Candidates are compared on the prompts and seeds that
    all of them share.
    """
    samples = comparison.samples
    score = comparison.chosen_score

    # The candidates' scores
    models = candidate_models(samples)
    paired = {}
    for scorer in comparison.scorers:
        paired[scorer] = comparison.per_prompt(models, scorer)[0]

    # Split the prompts by their text: one text may come twice, under two ids
    prompts = paired[score].index
    texts = samples.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
    choosing = choosing_mask(list(texts[prompts]))
    if min(choosing.sum(), (~choosing).sum()) < FEWEST_PROMPTS:
        return _no_answer(
            f"the models share {len(prompts)} prompts, too few to choose by some and report on "
            "others"
        )

    # Choose
    budget = comparison.options.path_kl
    path_kl = _path_kl(samples, models, prompts)
    try:
        choice = choose(paired[score].to_numpy(), path_kl, budget, choosing)
    except ValueError as error:
        return _no_answer(str(error))

    # Report
    candidates = _Candidates(models, paired, score, choosing)
    rows = _rows(candidates, choice, samples)
    own = _mark_chosen(candidates, rows)
    within_budget = ""
    if budget is not None:
        within_budget = f", of the models with a mean path KL of at most {number(budget)} nats"
    note = NOTE.format(
        score=score,
        budget=within_budget,
        choosing=choosing.sum(),
        reporting=(~choosing).sum(),
    )
    table = ResultTable.from_rows(
        "selection", "Every candidate, best first", note, rows, _columns(score)
    )
    best = rows[0]["alarm"]
    alarm = tuple(best.split(", ")) if best else ()
    sentences = [
        _worth(own, score, budget),
        *_alike(own, rows, score, len(prompts)),
        *_warning(own, rows[0], score),
    ]
    return Answer(table, " ".join(f"{sentence}." for sentence in sentences), alarm)


def _mark_chosen(candidates: _Candidates, rows: list[Row]) -> Row:
    """Mark the chosen row, those that cannot be told apart from it, and the difference to it.

    Args:
        candidates: of the rows.
        rows: the affordable ones first, best first.

    Returns:
        The chosen row.
    """
    affordable = [row for row in rows if row["affordable"]]
    calm = [row for row in affordable if not row["alarm"]] or affordable
    alike = [row for row in calm if candidates.is_alike(calm[0]["index"], row["index"])]
    is_known = all(np.isfinite(row["path_kl"]) for row in alike)
    chosen = min(alike, key=lambda row: row["path_kl"] if is_known else abs(row["lam"]))
    for row in rows:
        row["chosen"] = row is chosen
        row["alike"] = any(row is one for one in alike)
        row["below_chosen"] = candidates.difference(chosen["index"], row["index"])
        row["prompts_to_tell"], row["fewest_to_tell"] = candidates.prompts_to_tell(
            chosen["index"], row["index"]
        )
    return chosen


def selection(comparison: Comparison) -> ResultTable:
    """The table of `select`: every candidate, best first."""
    return select(comparison).table


def _no_answer(why: str) -> Answer:
    table = ResultTable.from_rows("selection", "Which lambda", why, [], [])
    return Answer(table, f"No lambda is chosen: {why}.")


def candidate_models(samples: pd.DataFrame) -> list[SampledModel]:
    """The models that lambda is chosen among.

    They are all realigned models. The reference, which all anchors share, is there once for each
    way of sampling.

    Args:
        samples: of `read_samples`.
    """
    models = samples[samples["realigned"]].drop_duplicates(MODEL_COLUMNS)
    is_twice = (models["lam"] == 0) & models.duplicated([*SAMPLING_COLUMNS, "lam"])
    rows = models[~is_twice][MODEL_COLUMNS].itertuples(index=False)
    return [SampledModel(*row) for row in rows]


def _path_kl(samples: pd.DataFrame, models: Sequence[SampledModel], prompts: pd.Index) -> Array:
    """(P, C): the mean path KL of each candidate on each prompt; 0 for the reference."""
    means = samples.groupby([*MODEL_COLUMNS, "prompt_id"])["path_kl"].mean()
    columns = []
    for model in models:
        if model.is_reference:
            columns.append(np.zeros(len(prompts)))
        else:
            columns.append(means[model].reindex(prompts).to_numpy(dtype=float))
    return np.stack(columns, axis=1)


def _rows(candidates: _Candidates, choice: Choice, samples: pd.DataFrame) -> list[Row]:
    """A row a candidate: the affordable ones first, best first. None is chosen yet."""
    betas = dict(zip(samples["anchor"], samples["beta"]))
    targets = {}
    for row in samples.drop_duplicates(MODEL_COLUMNS).to_dict("records"):
        targets[SampledModel.of_row(row)] = row["beta_target"]
    score = candidates.score

    def rank(index: int) -> tuple[bool, float]:
        return not choice.affordable[index], -choice.choosing_means[index]

    rows = []
    for index in sorted(range(len(candidates.models)), key=rank):
        model = candidates.models[index]
        reference = candidates.reference_of(index)
        gain = NO_ESTIMATE
        if reference is not None:
            gain = candidates.difference(index, reference)
        row = {
            "index": index,
            **model._asdict(),
            "choosing_mean": candidates.choosing_mean(score, index),
            "mean": paired_bootstrap(candidates.reported(score, [index]), _first),
            "gain": gain,
            "alarm": ", ".join(fallen_scores(candidates, index)),
            "beta": betas[model.anchor],
            "beta_target": targets[model],
            "path_kl": choice.path_kl[index],
            "affordable": bool(choice.affordable[index]),
        }
        rows.append(row)
    return rows


def fallen_scores(candidates: _Candidates, index: int) -> list[str]:
    """The reward-hacking alarm of one candidate: scorers that fell while the chosen score rose.

    A scorer has fallen if the candidate is clearly below that scorer's own best at a smaller lambda
    of the same anchor. That best is found on the choosing prompts, so that the fall, which is
    measured on the reporting prompts, is not the luck of the highest.

    Args:
        candidates: all of them.
        index: of the one candidate.
    """
    own = candidates.models[index]
    weaker = [i for i, model in enumerate(candidates.models) if model.is_weaker_than(own)]
    others = candidates.others
    if not weaker or not others:
        return []

    # Before: the chosen score at the smallest lambda, and each other scorer at its best
    smallest = min(weaker, key=lambda i: candidates.models[i].lam)
    before = [candidates.reported(candidates.score, [smallest])]
    for scorer in others:
        best = max(weaker, key=lambda i: candidates.choosing_mean(scorer, i))
        before.append(candidates.reported(scorer, [best]))

    # After: all scores of this candidate
    names = [candidates.score, *others]
    after = [candidates.reported(name, [index]) for name in names]

    alarm = reward_hacking(np.concatenate(before, axis=1), np.concatenate(after, axis=1))
    if not alarm.raised:
        return []
    return [names[column] for column in alarm.fallen]


def _columns(score: str) -> tuple[Column, ...]:
    return (
        Column("", text=_status),
        Column("anchor", text=_anchor),
        LAM,
        Column("target beta", text=_target_beta),
        Column("mode"),
        SAMPLED,
        Column("path KL", "path_kl"),
        Column(score, "mean"),
        Column("above the reference", "gain"),
        Column("below the chosen", "below_chosen"),
        Column("prompts to tell it", text=_prompts_to_tell),
        Column("alarm", text=lambda row: row["alarm"] or NOT_THERE),
    )


def _status(row: Row) -> str:
    if row["chosen"]:
        return "chosen"
    if row["alike"]:
        return "as good"
    return "" if row["affordable"] else "over the budget"


def _anchor(row: Row) -> str:
    return "reference" if row["lam"] == 0 else anchor_name(row["anchor"])


def _target_beta(row: Row) -> str:
    return NOT_THERE if pd.isna(row["beta_target"]) else number(row["beta_target"])


def _describe(row: Row) -> str:
    """A candidate in words."""
    if row["lam"] == 0:
        return "lam = 0, the reference"
    # A lambda that changes in time, or is of one branch of guidance, imitates no beta.
    target = f" in mode {row['mode']}"
    if not pd.isna(row["beta_target"]):
        target = f" (beta_target {row['beta_target']:,.6g})"
    return f"lam = {lam_text(row['anchor'], row['lam'])}{target} of {anchor_name(row['anchor'])}"


def _prompts_to_tell(row: Row) -> str:
    if not row["alike"] or row["chosen"]:
        return NOT_THERE
    return f"{_count(row['prompts_to_tell'])}, at least {_count(row['fewest_to_tell'])}"


def _count(prompts: float) -> str:
    """A number of prompts in two digits: it is an estimate."""
    return f"{float(f'{prompts:.2g}'):,.0f}" if np.isfinite(prompts) else "any number"


def _worth(own: Row, score: str, budget: float | None) -> str:
    """The answer: which lambda, and what it is worth."""
    text = f"Choose {_describe(own)}: on held-out prompts, {score} is {interval(own['mean'])}"
    if own["lam"] and np.isfinite(own["gain"].value):
        text += f", {interval(own['gain'])} above the reference"
    if np.isfinite(own["path_kl"]):
        text += f", at a path KL of {number(own['path_kl'])} nats"
        if budget is not None:
            text += f", within the budget of {number(budget)}"
    return text


def _alike(own: Row, rows: Sequence[Row], score: str, prompts: int) -> list[str]:
    """What cannot be told apart from the chosen one, and how many prompts would do so.

    Args:
        own: the chosen row.
        rows: all of them, best first.
        score: the scorer that chose.
        prompts: how many there are, choosing and reporting ones.
    """
    alike = [row for row in rows if row["alike"] and not row["chosen"]]
    if not alike:
        return []
    names = "; ".join(_describe(row) for row in alike)
    least = "path KL" if np.isfinite(own["path_kl"]) else "lam"
    sentence = f"{score} does not tell it apart from {names}: of these it has the smallest {least}"

    # The best of them: where the chosen one is the best, the next best
    best = alike[0]
    if not np.isfinite(best["prompts_to_tell"]):
        return [sentence, f"From {_describe(best)} no number of prompts would tell it"]
    return [
        sentence,
        f"About {_count(best['prompts_to_tell'])} prompts would tell it from {_describe(best)}, "
        f"and at least {_count(best['fewest_to_tell'])} (80 % power at 95 %); here are {prompts}",
    ]


def _warning(own: Row, best: Row, score: str) -> list[str]:
    """The alarm: of the chosen one for want of another, or of a better one.

    Args:
        own: the chosen row.
        best: the first row.
        score: the scorer that chose.
    """
    verb = "fall" if "," in best["alarm"] else "falls"
    if own["alarm"]:
        return [
            f"Reward-hacking alarm, as for every candidate: {own['alarm']} {verb} as {score} rises"
        ]
    if best["alarm"]:
        return [
            f"Passed over by the reward-hacking alarm: {_describe(best)}, {score} "
            f"{interval(best['mean'])}, where {best['alarm']} {verb} as {score} rises"
        ]
    return [f"No other score falls as {score} rises"] if own["lam"] else []
