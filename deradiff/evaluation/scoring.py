"""Scores of every image by every scorer. Nothing is scored twice: what was scored before, by any run, lies in a cache."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

import deradiff.scorers
from deradiff.files import write_atomic
from deradiff.scorers.base import Scorer
from deradiff.scorers.cache import Key, ScoreCache, key
from eval.config import ScorerConfig


def state() -> Any:
    """This process among those of torchrun or accelerate launch (accelerate's PartialState); alone it is the main process."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def score_images(
    samples: pd.DataFrame, scorers: dict[str, ScorerConfig], batch_size: int, cache: Path
) -> pd.DataFrame | None:
    """A row per image and scorer: the samples' columns but `file`, then `scorer` (the label), `version`, `scale`, `preprocessing`, `score`.

    cache: the folder of the scores of all runs. Under torchrun or accelerate launch the ranks share the images, on a GPU each; the main
    process gets the table and the others None. Killed at any moment, the same command goes on where it stopped. Raises ValueError for a
    score that is no number.
    """
    here, tables = state(), []
    rows = samples.drop(columns="file").assign(key=_keys(samples))
    with tqdm(
        total=len(samples) * len(scorers),
        unit="image",
        disable=None if here.is_main_process else True,
    ) as progress:
        for label, config in scorers.items():
            progress.set_description(label)
            scorer = deradiff.scorers.load_scorer(*settings(config), device=str(here.device))
            scores = _complete(
                scorer, label, samples, batch_size, ScoreCache(cache, scorer), progress
            )
            told = {
                "scorer": label,
                "version": scorer.version,
                "scale": scorer.scale,
                "preprocessing": scorer.preprocessing,
            }
            if here.is_main_process:
                tables.append(
                    rows.drop(columns="key").assign(**told, score=[scores[k] for k in rows["key"]])
                )
    return pd.concat(tables, ignore_index=True) if here.is_main_process else None


def settings(
    scorer: ScorerConfig,
) -> tuple[str, str | None, str | None, str | None, str | None, str | None]:
    """What `check_scorer` and `load_scorer` are called with."""
    return (
        scorer.name,
        scorer.checkpoint,
        scorer.tokenizer,
        scorer.model_config,
        scorer.head,
        scorer.file,
    )


def write_scores(scores: pd.DataFrame, file: Path) -> None:
    """The table as parquet: the old file or the new one, never a part."""
    buffer = io.BytesIO()
    scores.to_parquet(buffer, index=False)
    write_atomic(file, buffer.getvalue())


def _keys(samples: pd.DataFrame) -> list[Key]:
    return [key(sha256, prompt) for sha256, prompt in zip(samples["sha256"], samples["prompt"])]


def _complete(
    scorer: Scorer,
    label: str,
    samples: pd.DataFrame,
    batch_size: int,
    cache: ScoreCache,
    progress: tqdm,
) -> dict[Key, float]:
    """Score what the cache lacks; the ranks share it. The main process returns with every score, the others perhaps without some."""
    here, images = state(), samples.assign(key=_keys(samples)).drop_duplicates("key")
    todo = images[[k not in cache.scores for k in images["key"]]]
    progress.update(len(samples) - len(todo))
    here.wait_for_everyone()  # nobody writes before everybody has read, and so shares out the same rest
    _score(
        scorer,
        label,
        todo.iloc[here.process_index :: here.num_processes],
        batch_size,
        cache,
        progress,
    )
    here.wait_for_everyone()
    if here.is_main_process and here.num_processes > 1:
        cache.read()
        lost = todo[
            [k not in cache.scores for k in todo["key"]]
        ]  # on a file system that is slow to show what others wrote
        _score(scorer, label, lost, batch_size, cache, progress)
    return cache.scores


def _score(
    scorer: Scorer,
    label: str,
    images: pd.DataFrame,
    batch_size: int,
    cache: ScoreCache,
    progress: tqdm,
) -> None:
    for start in range(0, len(images), batch_size):
        batch = images.iloc[start : start + batch_size]
        cache.add(batch["key"], _scores(scorer, label, batch))
        progress.update(len(batch))


def _scores(scorer: Scorer, label: str, batch: pd.DataFrame) -> list[float]:
    images = [Image.open(file).convert("RGB") for file in batch["file"]]
    scores = scorer(images, list(batch["prompt"])).double().cpu().numpy()
    broken = [file for file, score in zip(batch["file"], scores) if not np.isfinite(score)]
    if broken:
        raise ValueError(
            f"the scorer {label} gave no finite score for {broken[0]}; leave it out of scorers=[...] or give another checkpoint"
        )
    return [float(s) for s in scores]
