"""Who assesses images, and what they all say: scores, and preferences beside people's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from deradiff.evaluation.asking import Notify, report_usage
from deradiff.evaluation.judging import JUDGEMENTS, PAIRWISE, PairJudging, pairs_of_models
from deradiff.evaluation.pairing import Cell
from deradiff.evaluation.scoring import SCORES, score_images, write_scores
from deradiff.evaluation.shared_work import process_state
from deradiff.evaluation.votes import VOTES, Votes, score_votes
from deradiff.scorers import check_prompts
from deradiff.scorers.pairwise import load_pairwise_judge
from deradiff.scorers.spec import PairwiseSpec, ScorerSpec
from deradiff.terminal import say


@dataclass(frozen=True)
class Assessors:
    """Who assesses images.

    Attributes:
        scorers: by label.
        votes: of people, which the scorers are held against; None: none.
        pairwise: a judge of pairs; None: none.
    """

    scorers: Mapping[str, ScorerSpec]
    votes: Votes | None = None
    pairwise: PairwiseSpec | None = None

    def check_prompts(self, prompts: pd.Series) -> None:
        """Refuse prompts of images or votes for which a scorer has no score. Raises ValueError."""
        for spec in self.scorers.values():
            check_prompts(spec, prompts)
            if self.votes is not None:
                check_prompts(spec, self.votes.table["prompt"])


class Assessment(NamedTuple):
    """What the assessors say.

    Attributes:
        scores: a row per image and scorer (`score_images`).
        votes: a row per vote and scorer (`score_votes`), the judge of pairs among the scorers;
            None: there are no votes.
        judgements: a row per pair of images (`PairJudging.prefer`); None: there is no such judge.
    """

    scores: pd.DataFrame
    votes: pd.DataFrame | None
    judgements: pd.DataFrame | None


def assess(
    samples: pd.DataFrame,
    cells: Sequence[Cell],
    assessors: Assessors,
    batch_size: int,
    cache: Path,
    notify: Notify = say,
) -> Assessment | None:
    """Assess all images. After a kill, the same call goes on where it stopped.

    Args:
        samples: a row an image (`read_samples`).
        cells: the realigned models that have a target, mixtures among them.
        assessors: of the images.
        batch_size: images scored at once.
        cache: the folder of the scores of all runs.
        notify: takes a sentence on what judges behind servers are asked.

    Returns:
        What they say. Processes other than the main one get None.

    Raises:
        ValueError: as `score_images`.
    """
    assessors.check_prompts(samples["prompt"])
    voted = assessors.votes
    judging = None
    if assessors.pairwise is not None:
        pairs = pairs_of_models(samples, cells, assessors.pairwise.against)
        judging = PairJudging(load_pairwise_judge(assessors.pairwise), cache)
        _announce(judging, pairs, voted, notify)

    scores = score_images(samples, assessors.scorers, batch_size, cache, notify)
    votes = None
    if voted is not None:
        votes = score_votes(voted, assessors.scorers, batch_size, cache, notify)

    judgements = None
    if judging is not None:
        with report_usage({PAIRWISE: judging.judge}, notify):
            judgements = judging.prefer(pairs)
            if voted is not None:
                own = judging.prefer(voted.table, voted.image)[VOTE_COLUMNS]
                votes = pd.concat([votes, own.assign(scorer=PAIRWISE)], ignore_index=True)
    return None if scores is None else Assessment(scores, votes, judgements)


VOTE_COLUMNS = ["row", "prompt", "label", "preference"]
"""What is kept of a judge's preferences beside votes."""


def _announce(
    judging: PairJudging, pairs: pd.DataFrame, votes: Votes | None, notify: Notify
) -> None:
    """Say how many questions a judge of pairs will get, and try its server out with one.

    Raises:
        ValueError: where it cannot be asked. Scorers may take hours before its turn comes.
    """
    count = judging.open_questions(pairs)
    if votes is not None:
        count += judging.open_questions(votes.table)
    if count and process_state().is_main_process:
        endpoint = judging.judge.endpoint
        notify(f"{PAIRWISE}: {count:,} questions to {endpoint.model}, two for each pair")
        judging.try_out()


def write_assessment(folder: Path, assessment: Assessment) -> None:
    """Write what the assessors say, a parquet file a table; a table that is not there has none.

    Args:
        folder: where they go.
        assessment: what they say.
    """
    files = {
        SCORES: assessment.scores,
        VOTES: assessment.votes,
        JUDGEMENTS: assessment.judgements,
    }
    for name, table in files.items():
        if table is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_scores(table, folder / name)
