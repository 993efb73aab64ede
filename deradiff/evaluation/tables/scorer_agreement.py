"""Whether scorers agree with each other: on which of two images is better, and on rankings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.judging import PAIRWISE
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.preferences import (
    kendall_tau,
    pairs_of,
    preferences,
    same_preference,
)
from deradiff.evaluation.statistics import UNKNOWN, Array, Estimate, paired_bootstrap
from deradiff.evaluation.tables.table import Column, ResultTable, Row

NOTE = """Same preference: the share of pairs of images, in %, on which both prefer the same one; a
tie of either counts half, and 50 is chance. Images: the pairs are of one prompt, of different
models from the same noise. Kendall's tau (b): of their rankings of all images of a prompt, from -1
to 1; 0 is chance. Both are means over prompts, with 95 % bootstrap intervals over prompts. Scorers
that agree may be wrong together."""

TIES_NOTE = """With people: on {votes:,} of their votes, of which {ties:,} are ties, so that no
scorer comes above {most:.3g} %."""

TITLE = "Whether scorers agree"
PEOPLE = "people"


def scorer_agreement(comparison: Comparison) -> ResultTable:
    """How far scorers agree with people, where there are votes, and with each other."""
    note = NOTE
    rows: list[Row] = []
    if comparison.votes is not None:
        rows += _with_people(comparison.votes)
        note += " " + _ties_note(comparison.votes)
    if comparison.judgements is not None:
        rows += _with_judge(comparison, comparison.judgements)
    rows += _between_scorers(comparison)
    return ResultTable.from_rows("scorer_agreement", TITLE, note, rows, COLUMNS)


def _with_people(votes: pd.DataFrame) -> list[Row]:
    """The row of each scorer beside people's votes."""
    rows = []
    for scorer, own in votes.groupby("scorer", sort=False):
        same = _same_of_shares(own["preference"], own["label"])
        row: Row = {
            "scorer": scorer,
            "other": PEOPLE,
            "on": "votes",
            "pairs": len(own),
            "prompts": own["prompt"].nunique(),
            "same": mean_over_prompts(100 * same, own["prompt"]),
            "tau": UNKNOWN,
        }
        rows.append(row)
    return rows


def _with_judge(comparison: Comparison, judgements: pd.DataFrame) -> list[Row]:
    """The row of each scorer beside a judge of pairs, on the pairs that were judged."""
    if not len(judgements):
        return []
    rows = []
    for scorer in comparison.scorers:
        own = comparison.scores[comparison.scores["scorer"] == scorer]
        images = zip(own["sha256"], own["prompt"])
        score_of = dict(zip(images, own["score"]))
        sides = []
        for side in (0, 1):
            images = zip(judgements[f"sha256_{side}"], judgements["prompt"])
            sides.append(np.array([score_of[image] for image in images]))
        preference = pd.Series((1 + np.sign(sides[0] - sides[1])) / 2, judgements.index)
        same = _same_of_shares(preference, judgements["preference"])
        row: Row = {
            "scorer": scorer,
            "other": PAIRWISE,
            "on": "judged pairs",
            "pairs": len(judgements),
            "prompts": judgements["prompt_id"].nunique(),
            "same": mean_over_prompts(100 * same, judgements["prompt_id"]),
            "tau": UNKNOWN,
        }
        rows.append(row)
    return rows


def _same_of_shares(one: pd.Series, other: pd.Series) -> pd.Series:
    """1 where both prefer the same image, 0 where they differ, 1/2 where either sees a tie.

    Args:
        one: 1 for the first image, 0 for the second one, 1/2 for a tie.
        other: likewise.
    """
    return (1 + (2 * one - 1) * (2 * other - 1)) / 2


def _ties_note(votes: pd.DataFrame) -> str:
    """How many of people's votes are ties, and what share a scorer can reach at most."""
    labels = votes.drop_duplicates("row")
    is_tie = labels["label"] == 0.5
    most = mean_over_prompts(100 * (1 - is_tie / 2), labels["prompt"])
    return TIES_NOTE.format(votes=len(labels), ties=is_tie.sum(), most=most.value)


def _between_scorers(comparison: Comparison) -> list[Row]:
    """The rows of every two scorers, on all images that were scored."""
    scorers = list(comparison.scorers)
    prompts: list[str] = []
    pairs: list[int] = []
    same: list[Array] = []
    tau: list[Array] = []
    for prompt, seeds, scores in _images_of_prompts(comparison.scores, scorers):
        preferred = preferences(scores)
        first, second = pairs_of(len(scores))
        from_same_noise = preferred[seeds[first] == seeds[second]]
        prompts.append(prompt)
        pairs.append(len(from_same_noise))
        same.append(same_preference(from_same_noise))
        tau.append(kendall_tau(preferred))
    if not prompts:
        return []

    rows = []
    for i, j in combinations(range(len(scorers)), 2):
        row: Row = {
            "scorer": scorers[i],
            "other": scorers[j],
            "on": "images",
            "pairs": sum(pairs),
            "prompts": len(set(prompts)),
            "same": mean_over_prompts([100 * table[i, j] for table in same], prompts),
            "tau": mean_over_prompts([table[i, j] for table in tau], prompts),
        }
        rows.append(row)
    return rows


def _images_of_prompts(
    scores: pd.DataFrame, scorers: Sequence[str]
) -> list[tuple[str, Array, Array]]:
    """The images of each prompt that were sampled in one way, where there are at least two.

    An image that several runs hold, such as the reference's, counts once.

    Returns:
        For each, the prompt's id, the seeds (N,), and the scores (N, S).
    """
    wide = scores.pivot_table(
        index=["prompt_id", *SAMPLING_COLUMNS, "seed", "sha256"],
        columns="scorer",
        values="score",
        aggfunc="first",
    )
    groups = []
    for (prompt, *_), images in wide[list(scorers)].groupby(["prompt_id", *SAMPLING_COLUMNS]):
        if len(images) > 1:
            seeds = images.index.get_level_values("seed").to_numpy()
            groups.append((prompt, seeds, images.to_numpy(dtype=float)))
    return groups


def mean_over_prompts(
    values: Sequence[float] | pd.Series, prompts: Sequence[str] | pd.Series
) -> Estimate:
    """The mean over prompts of their means, with its interval.

    Args:
        values: any number of each prompt; nan does not count.
        prompts: whose values they are.
    """
    means = pd.Series(np.asarray(values, dtype=float)).groupby(np.asarray(prompts)).mean()
    return paired_bootstrap(means.to_numpy()[:, None], lambda column: column[..., 0])


COLUMNS = (
    Column("scorer"),
    Column("with", "other"),
    Column("on"),
    Column("pairs", text=lambda row: f"{row['pairs']:,}"),
    Column("prompts", text=lambda row: f"{row['prompts']:,}"),
    Column("same preference, %", "same"),
    Column("Kendall's tau", "tau"),
)
