"""Scores of every image by every scorer.

Nothing is scored twice: what was scored before, by any run, lies in a cache. Under torchrun or
accelerate launch the processes share the images.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from tqdm import tqdm

from deradiff.evaluation.asking import Notify, Row, ask_each, counted, judge_errors
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


def process_state() -> PartialState:
    """This process among those of torchrun or accelerate launch; alone it is the main process."""
    return PartialState(cpu=not torch.cuda.is_available())


def score_images(
    samples: pd.DataFrame,
    scorers: Mapping[str, ScorerSpec],
    batch_size: int,
    cache: Path,
    notify: Notify = say,
) -> pd.DataFrame | None:
    """Score every image by every scorer.

    After a kill, the same call goes on where it stopped.

    Args:
        samples: a row an image (`read_samples`).
        scorers: by label.
        batch_size: images scored at once.
        cache: the folder of the scores of all runs.
        notify: takes a sentence on what judges behind servers were asked.

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
    rows = samples.drop(columns="file").assign(key=_keys(samples))
    tables = []
    total = len(samples) * len(scorers)
    is_shown = state.is_main_process
    with counted(judges, notify), progress_bar(total, None, "image", is_shown=is_shown) as progress:
        for label, spec in scorers.items():
            progress.set_description(label)
            scorer = judges.get(label) or load_spec(spec, device=str(state.device))
            store = ScoreCache(cache, scorer)
            run = _ScoringRun(scorer, label, batch_size, store, progress)
            with judge_errors(label) if label in judges else nullcontext():
                scores = run.complete(samples)

            # The main process has them all
            if state.is_main_process:
                table = rows.drop(columns="key").assign(
                    scorer=label,
                    version=scorer.version,
                    scale=scorer.scale,
                    preprocessing=scorer.preprocessing,
                    score=[scores[key] for key in rows["key"]],
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


class _ScoringRun:
    """One scorer's share of `score_images`."""

    def __init__(
        self, scorer: Scorer, label: str, batch_size: int, cache: ScoreCache, progress: tqdm
    ) -> None:
        self.scorer = scorer
        self.label = label
        self.batch_size = batch_size
        self.cache = cache
        self.progress = progress

    def complete(self, samples: pd.DataFrame) -> dict[ScoreKey, float]:
        """Score what the cache lacks; the processes share it.

        The main process returns with every score, the others perhaps without some.
        """
        state = process_state()
        images = samples.assign(key=_keys(samples)).drop_duplicates("key")
        missing = self._missing(images)
        self.progress.update(len(samples) - len(missing))

        # Nobody writes before everybody has read, and so shares out the same rest
        state.wait_for_everyone()
        self._score(missing.iloc[state.process_index :: state.num_processes])
        state.wait_for_everyone()

        # A file system may be slow to show what others wrote
        if state.is_main_process and state.num_processes > 1:
            self.cache.read()
            self._score(self._missing(missing))
        return self.cache.scores

    def _missing(self, images: pd.DataFrame) -> pd.DataFrame:
        """The images whose score the cache lacks."""
        is_missing = [key not in self.cache.scores for key in images["key"]]
        return images[is_missing]

    def _score(self, images: pd.DataFrame) -> None:
        """Score images in batches, each of which goes to the cache at once.

        A judge is asked about one at a time, several at once.
        """
        if isinstance(self.scorer, Judge):
            self._ask(self.scorer, images)
            return
        for start in range(0, len(images), self.batch_size):
            batch = images.iloc[start : start + self.batch_size]
            self.cache.add(batch["key"], self._scores(batch))
            self.progress.update(len(batch))

    def _ask(self, judge: Judge, images: pd.DataFrame) -> None:
        def score_one(row: Row) -> float:
            return judge.score(read_image(row["about"]), row["prompt"])

        rows = images.rename(columns={"file": "about"})[["key", "about", "prompt"]]
        ask_each(judge, score_one, rows.to_dict("records"), self.cache, self.progress)

    def _scores(self, batch: pd.DataFrame) -> list[float]:
        images = [read_image(file) for file in batch["file"]]
        prompts = list(batch["prompt"])
        scores = self.scorer(images, prompts).double().cpu().numpy()
        for file, score in zip(batch["file"], scores):
            if not np.isfinite(score):
                raise ValueError(
                    f"the scorer {self.label} gave no finite score for {file}; remove it from the "
                    "scorers or give another checkpoint"
                )
        return [float(score) for score in scores]
