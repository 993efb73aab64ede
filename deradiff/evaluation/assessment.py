"""Who assesses images, and what they all say: scores, and preferences beside people's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from deradiff.evaluation.asking import Notify
from deradiff.evaluation.scoring import SCORES, score_images, write_scores
from deradiff.evaluation.votes import VOTES, Votes, score_votes
from deradiff.scorers import check_prompts
from deradiff.scorers.spec import ScorerSpec
from deradiff.terminal import say


@dataclass(frozen=True)
class Assessors:
    """Who assesses images.

    Attributes:
        scorers: by label.
        votes: of people, which the scorers are held against; None: none.
    """

    scorers: Mapping[str, ScorerSpec]
    votes: Votes | None = None

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
        votes: a row per vote and scorer (`score_votes`); None: there are no votes.
    """

    scores: pd.DataFrame
    votes: pd.DataFrame | None


def assess(
    samples: pd.DataFrame,
    assessors: Assessors,
    batch_size: int,
    cache: Path,
    notify: Notify = say,
) -> Assessment | None:
    """Assess all images. After a kill, the same call goes on where it stopped.

    Args:
        samples: a row an image (`read_samples`).
        assessors: of the images.
        batch_size: images scored at once.
        cache: the folder of the scores of all runs.
        notify: takes a sentence on what judges behind servers were asked.

    Returns:
        What they say. Processes other than the main one get None.

    Raises:
        ValueError: as `score_images`.
    """
    assessors.check_prompts(samples["prompt"])
    scores = score_images(samples, assessors.scorers, batch_size, cache, notify)
    votes = None
    if assessors.votes is not None:
        votes = score_votes(assessors.votes, assessors.scorers, batch_size, cache, notify)
    return None if scores is None else Assessment(scores, votes)


def write_assessment(folder: Path, assessment: Assessment) -> None:
    """Write what the assessors say, a parquet file a table; a table that is not there has none.

    Args:
        folder: where they go.
        assessment: what they say.
    """
    files = {SCORES: assessment.scores, VOTES: assessment.votes}
    for name, table in files.items():
        if table is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_scores(table, folder / name)
