"""Which lambda: the best score under a path-KL budget, chosen on one half of the prompts and reported on the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import ANCHOR, GROUP, Group, per_prompt, short
from deradiff.evaluation.selection import choose, for_choosing, reward_hacking
from deradiff.evaluation.statistics import Estimate, paired_bootstrap
from deradiff.evaluation.tables.table import Table, bench, interval, number, spread, table
from eval.config import SelectConfig

LAM = GROUP.index("lam")
FEWEST = 2  # prompts to choose by, and as many to report on: of one there is no interval

SELECTION = """Chosen: the largest mean {score} over the choosing prompts{budget}. All other numbers are of the reporting prompts, which
had no say: {choosing} and {reporting} prompts, split by a hash of their text. Below the chosen: the paired difference; where its interval
holds 0, the two cannot be told apart. Alarm: the scores that have fallen from their own best at a smaller lambda of that anchor, by an
interval below 0 that allows for their number, while {score} has risen: reward hacking. Brackets: 95 % bootstrap intervals over prompts."""


@dataclass(frozen=True)
class Answer:
    """table: every candidate. sentence: which lambda, and the alarm where there is one. alarm: the scorers that fall at that lambda."""

    table: Table
    sentence: str
    alarm: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Study:
    """The candidates' scores on the prompts that all share: by scorer, a row a prompt and a column a candidate."""

    candidates: list[Group]
    paired: dict[str, pd.DataFrame]
    score: str
    choosing: NDArray[np.bool_]

    def reported(self, scorer: str, columns: list[int]) -> NDArray[np.float64]:
        return self.paired[scorer].loc[~self.choosing, columns].to_numpy()


def select(
    samples: pd.DataFrame,
    groups: dict[Group, pd.DataFrame],
    scorers: list[str],
    config: SelectConfig,
) -> Answer:
    """The best of the models in `samples` (not in references) by `config.score`, of those whose mean path KL is within the budget.

    Compared on the prompts and seeds that all of them share.
    """
    score, candidates = str(config.score), _candidates(samples)
    paired = {scorer: per_prompt(groups, candidates, scorer)[0] for scorer in scorers}
    prompts = paired[score].index
    texts = samples.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
    choosing = for_choosing(list(texts[prompts]))  # by the text: it may come twice, under two ids
    if min(choosing.sum(), (~choosing).sum()) < FEWEST:
        return _none(
            f"the models share {len(prompts)} prompts, too few to choose by some and report on others"
        )
    kl = samples.groupby([*GROUP, "prompt_id"])["path_kl"].mean()
    path_kl = np.stack(
        [
            np.zeros(len(prompts)) if g[LAM] == 0 else kl[g].reindex(prompts).to_numpy(dtype=float)
            for g in candidates
        ],
        axis=1,
    )
    try:
        choice = choose(paired[score].to_numpy(), path_kl, config.path_kl, choosing)
    except ValueError as error:
        return _none(str(error))
    study = _Study(candidates, paired, score, choosing)
    betas = dict(zip(samples["anchor"], samples["beta"]))
    rows = [
        _row(i, choice.index, study)
        | {"beta": betas[candidates[i][ANCHOR]], "path_kl": choice.path_kl[i]}
        | {"affordable": bool(choice.affordable[i]), "chosen": i == choice.index}
        for i in sorted(
            range(len(candidates)), key=lambda i: (not choice.affordable[i], -choice.chosen_by[i])
        )
    ]
    own = next(row for row in rows if row["chosen"])
    budget = (
        f", of the models with a mean path KL of at most {number(config.path_kl)} nats"
        if config.path_kl is not None
        else ""
    )
    note = SELECTION.format(
        score=score, budget=budget, choosing=choosing.sum(), reporting=(~choosing).sum()
    )
    made = table(
        "selection",
        "Every candidate, best first",
        note,
        pd.DataFrame(rows),
        [_shown(row, score) for row in rows],
    )
    return Answer(
        made,
        _sentence(own, rows, score, config.path_kl),
        tuple(own["alarm"].split(", ")) if own["alarm"] else (),
    )


def _none(why: str) -> Answer:
    return Answer(
        table("selection", "Which lambda", why, pd.DataFrame(), []), f"No lambda is chosen: {why}."
    )


def _candidates(samples: pd.DataFrame) -> list[Group]:
    """Every model of `samples`; the reference, which all anchors share, once for each way of sampling."""
    models = samples[samples["realigned"]].drop_duplicates(GROUP)
    twice = (models["lam"] == 0) & models.duplicated([*SAMPLING_COLUMNS, "lam"])
    return [tuple(row) for row in models[~twice][GROUP].itertuples(index=False)]


def _row(i: int, best: int, study: _Study) -> dict[str, Any]:
    group = study.candidates[i]
    reference = next(
        (j for j, g in enumerate(study.candidates) if g[LAM] == 0 and g[:ANCHOR] == group[:ANCHOR]),
        None,
    )
    difference = lambda one, other: paired_bootstrap(
        study.reported(study.score, [one, other]), lambda m: m[..., 0] - m[..., 1]
    )  # noqa: E731
    return (
        dict(zip(GROUP, group))
        | {"choosing_mean": study.paired[study.score].loc[study.choosing, i].mean()}
        | spread("mean", paired_bootstrap(study.reported(study.score, [i]), lambda m: m[..., 0]))
        | spread(
            "gain",
            difference(i, reference) if reference is not None else Estimate(np.nan, np.nan, np.nan),
        )
        | spread("below_chosen", difference(best, i))
        | {"alarm": ", ".join(_alarm(i, study))}
    )


def _alarm(i: int, study: _Study) -> list[str]:
    """The scorers that have fallen from their own best at a smaller lambda, as the chosen score rose.

    Each scorer's best is found on the choosing prompts, so that the fall that the reporting prompts show is not the luck of the highest.
    """
    own, others = study.candidates[i], [scorer for scorer in study.paired if scorer != study.score]
    before = [
        j
        for j, g in enumerate(study.candidates)
        if g[:ANCHOR] == own[:ANCHOR]
        and g[LAM] < own[LAM]
        and (g[LAM] == 0 or g[ANCHOR:LAM] == own[ANCHOR:LAM])
    ]
    if not before or not others:
        return []
    best = {
        scorer: max(before, key=lambda j: study.paired[scorer].loc[study.choosing, j].mean())
        for scorer in others
    }
    best[study.score] = min(before, key=lambda j: study.candidates[j][LAM])
    names = [study.score, *others]
    at = lambda where: np.concatenate(
        [study.reported(name, [where[name]]) for name in names], axis=1
    )  # noqa: E731
    alarm = reward_hacking(at(best), at(dict.fromkeys(names, i)), optimised=0)
    return [names[k] for k in alarm.fallen] if alarm.raised else []


def _shown(row: dict[str, Any], score: str) -> dict[str, str]:
    return {
        "": "chosen" if row["chosen"] else "" if row["affordable"] else "over the budget",
        "anchor": "reference" if row["lam"] == 0 else short(row["anchor"]),
        "lam": number(row["lam"]),
        "target beta": number(
            row["beta"] / row["lam"] if row["lam"] and not pd.isna(row["beta"]) else None
        ),
        "mode": row["mode"],
        "sampled": bench(row),
        "path KL": number(row["path_kl"]),
        score: interval(row, "mean"),
        "above the reference": interval(row, "gain"),
        "below the chosen": interval(row, "below_chosen"),
        "alarm": row["alarm"] or "–",
    }


def _named(row: dict[str, Any]) -> str:
    if row["lam"] == 0:
        return "lam = 0, the reference"
    aim = "" if pd.isna(row["beta"]) else f" (beta_target {row['beta'] / row['lam']:,.6g})"
    return f"lam = {row['lam']:g}{aim} of {short(row['anchor'])}"


def _sentence(
    own: dict[str, Any], rows: list[dict[str, Any]], score: str, budget: float | None
) -> str:
    text = f"Choose {_named(own)}: on prompts that had no say in it, {score} is {interval(own, 'mean')}"
    if own["lam"] and np.isfinite(own["gain"]):
        text += f", {interval(own, 'gain')} above the reference"
    within = f", within the budget of {number(budget)}" if budget is not None else ""
    text += (
        f", at a path KL of {number(own['path_kl'])} nats{within}"
        if np.isfinite(own["path_kl"])
        else ""
    )
    if not own["alarm"]:
        return text + "; no other score falls as it rises."
    calm = next((row for row in rows if row["affordable"] and not row["alarm"]), None)
    instead = (
        f"; the best without it is {_named(calm)}, {score} {interval(calm, 'mean')}" if calm else ""
    )
    return f"{text}. Reward-hacking alarm: {own['alarm']} {'fall' if ',' in own['alarm'] else 'falls'} as {score} rises{instead}."
