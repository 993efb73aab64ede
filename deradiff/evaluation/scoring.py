"""Scores of every image by every scorer.

Nothing is scored twice: what was scored before, by any run, lies in a cache. Under torchrun or
accelerate launch the processes share the images.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from deradiff.evaluation.asking import Notify, Row, ask_each, judge_errors, report_usage
from deradiff.evaluation.shared_work import BatchedWork, SharedWork, process_state
from deradiff.files import write_atomic
from deradiff.image_files import read_image
from deradiff.progress import progress_bar
from deradiff.scorers import check_prompts, load_spec
from deradiff.scorers.base import Scorer
from deradiff.scorers.cache import ScoreCache, ScoreKey, score_key
from deradiff.scorers.judge import Judge
from deradiff.scorers.spec import ScorerSpec
from deradiff.terminal import say

SCORES = "scores.parquet"
"""The file of an evaluation's scores."""

ReadImage = Callable[[str], Image.Image]
"""Gives the image of a file, or of another name."""


def score_images(
    samples: pd.DataFrame,
    scorers: Mapping[str, ScorerSpec],
    batch_size: int,
    cache: Path,
    notify: Notify = say,
    read: ReadImage = read_image,
) -> pd.DataFrame | None:
    """Score every image by every scorer.

    After a kill, the same call goes on where it stopped.

    Args:
        samples: a row an image (`read_samples`).
        scorers: by label.
        batch_size: images scored at once.
        cache: the folder of the scores of all runs.
        notify: takes a sentence on what judges behind servers were asked.
        read: the image of a `file`.

    Returns:
        A row per image and scorer: the samples' columns but `file`, then `scorer` (the label),
        `version`, `scale`, `preprocessing`, `score`. Processes other than the main one get None.

    Raises:
        ValueError: for a prompt that a scorer cannot judge by, and a server that does not answer,
            before an image is scored; for a score that is not a finite number.
    """
    for spec in scorers.values():
        check_prompts(spec, samples["prompt"])
    state = process_state()
    judges = _judges(samples, scorers, cache)
    keys = _keys(samples)
    images = samples.assign(keys=[(key,) for key in keys])
    tables = []
    total = len(samples) * len(scorers)
    is_shown = state.is_main_process
    with (
        report_usage(judges, notify),
        progress_bar(total, None, "image", is_shown=is_shown) as progress,
    ):
        for label, spec in scorers.items():
            progress.set_description(label)
            judge = judges.get(label)
            scorer = judge or load_spec(spec, device=str(state.device))
            store = ScoreCache(cache, scorer)
            if judge:
                with judge_errors(label):
                    scores = _Asking(judge, store, progress, read).complete(images)
            else:
                work = _Scoring(scorer, label, store, batch_size, progress, read)
                scores = work.complete(images)

            # The main process has them all
            if state.is_main_process:
                table = samples.drop(columns="file").assign(
                    scorer=label,
                    version=scorer.version,
                    scale=scorer.scale,
                    preprocessing=scorer.preprocessing,
                    score=[scores[key] for key in keys],
                )
                tables.append(table)
    return pd.concat(tables, ignore_index=True) if state.is_main_process else None


def _judges(
    samples: pd.DataFrame, scorers: Mapping[str, ScorerSpec], cache: Path
) -> dict[str, Judge]:
    """The judges among the scorers, by label.

    Raises:
        ValueError: where one is needed and its server does not answer. Other scorers may take
            hours before its turn comes.
    """
    state = process_state()
    judges = {}
    for label, spec in scorers.items():
        if spec.endpoint is None:
            continue
        judge = load_spec(spec)
        assert isinstance(judge, Judge)
        known = ScoreCache(cache, judge).scores
        if state.is_main_process and not set(_keys(samples)) <= set(known):
            with judge_errors(label):
                judge.try_out(images=1)
        judge.client.divide(state.num_processes)
        judges[label] = judge
    return judges


def write_scores(scores: pd.DataFrame, file: Path) -> None:
    """Write scores as parquet, in one piece: a kill leaves the old file or the new one.

    Args:
        scores: of `score_images`.
        file: where they go.
    """
    buffer = io.BytesIO()
    scores.to_parquet(buffer, index=False)
    write_atomic(file, buffer.getvalue())


def _keys(samples: pd.DataFrame) -> list[ScoreKey]:
    rows = zip(samples["sha256"], samples["prompt"])
    return [score_key(sha256, prompt) for sha256, prompt in rows]


class _Scoring(BatchedWork):
    """One scorer's scores of images.

    Args:
        scorer: the scorer.
        label: of the scorer.
        cache: of its scores.
        batch_size: images at once.
        progress: over images.
        read: the image of a file.
    """

    def __init__(
        self,
        scorer: Scorer,
        label: str,
        cache: ScoreCache,
        batch_size: int,
        progress: tqdm,
        read: ReadImage,
    ) -> None:
        super().__init__(cache, batch_size, progress)
        self.scorer = scorer
        self.label = label
        self.read = read

    def compute(self, batch: pd.DataFrame) -> dict[ScoreKey, float]:
        """The scores of some images."""
        images = [self.read(file) for file in batch["file"]]
        scores = self.scorer(images, list(batch["prompt"])).double().cpu().numpy()
        by_key = {}
        for (key,), file, score in zip(batch["keys"], batch["file"], scores):
            if not np.isfinite(score):
                raise ValueError(
                    f"the scorer {self.label} gave no finite score for {file}; remove it from the "
                    "scorers or give another checkpoint"
                )
            by_key[key] = float(score)
        return by_key


class _Asking(SharedWork):
    """A judge's scores of images: it is asked about one at a time, several at once.

    Args:
        judge: the judge.
        cache: of its scores.
        progress: over images.
        read: the image of a file.
    """

    def __init__(self, judge: Judge, cache: ScoreCache, progress: tqdm, read: ReadImage) -> None:
        super().__init__(cache, progress)
        self.judge = judge
        self.read = read

    def compute_all(self, things: pd.DataFrame) -> None:
        """Ask about images."""

        def score_one(row: Row) -> float:
            return self.judge.score(self.read(row["about"]), row["prompt"])

        rows = things.rename(columns={"file": "about"})[["about", "prompt"]]
        rows = rows.assign(key=[key for (key,) in things["keys"]])
        ask_each(self.judge, score_one, rows.to_dict("records"), self.cache, self.progress)
