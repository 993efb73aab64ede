"""Scores of every image by every scorer, kept in one parquet that the same command completes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

import deradiff.scorers
from deradiff.runs import write_atomic
from deradiff.scorers.base import Scorer
from eval.config import ScorerConfig
from eval.samples import MANIFEST

Key = tuple[str, str, str, str]  # sha256, prompt, label, version: what a score depends on


def score_images(samples: pd.DataFrame, scorers: dict[str, ScorerConfig], batch_size: int, file: Path) -> pd.DataFrame:
    """A row per image and scorer: the manifest's columns, `scorer` (the label), `version`, `scale`, `preprocessing` and `score`.

    `file` is written after each run directory and scorer; what it holds already is not scored again. Raises ValueError for a score
    that is no number.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held = pd.read_parquet(file) if file.is_file() else pd.DataFrame(columns=["run", "scorer"])
    known = dict(zip(_keys(held), held["score"])) if len(held) else {}
    with tqdm(total=len(samples) * len(scorers), unit="image", disable=None) as progress:
        for label, config in scorers.items():
            progress.set_description(label)
            scorer = deradiff.scorers.load_scorer(*settings(config), device=device)
            for run, images in samples.groupby("run", sort=False):
                told = {"scorer": label, "version": scorer.version, "scale": scorer.scale, "preprocessing": scorer.preprocessing}
                rows = images[["run", *MANIFEST]].assign(**told)
                todo = images[[key not in known for key in _keys(rows)]].drop_duplicates(["sha256", "prompt"])
                progress.update(len(images) - len(todo))
                for start in range(0, len(todo), batch_size):
                    batch = todo.iloc[start : start + batch_size]
                    known |= zip(_keys(batch.assign(**told)), _scores(scorer, label, batch))
                    progress.update(len(batch))
                rows["score"] = [known[key] for key in _keys(rows)]
                before = held[(held["run"] != run) | (held["scorer"] != label)]
                held = pd.concat([before, rows], ignore_index=True) if len(before) else rows
                if len(todo):
                    _write(held, file)
    _write(held, file)
    return held


def settings(scorer: ScorerConfig) -> tuple[str, str | None, str | None, str | None]:
    """What `check_scorer` and `load_scorer` are called with."""
    return scorer.name, scorer.checkpoint, scorer.tokenizer, scorer.model_config


def _keys(rows: pd.DataFrame) -> list[Key]:
    return list(zip(rows["sha256"], rows["prompt"], rows["scorer"], rows["version"]))


def _scores(scorer: Scorer, label: str, batch: pd.DataFrame) -> list[float]:
    images = [Image.open(file).convert("RGB") for file in batch["file"]]
    scores = scorer(images, list(batch["prompt"])).double().cpu().numpy()
    broken = [file for file, score in zip(batch["file"], scores) if not np.isfinite(score)]
    if broken:
        raise ValueError(
            f"the scorer {label} gave no finite score for {broken[0]}; leave it out of scorers=[...] or give another checkpoint"
        )
    return [float(s) for s in scores]


def _write(scores: pd.DataFrame, file: Path) -> None:
    buffer = io.BytesIO()
    scores.to_parquet(buffer, index=False)
    write_atomic(file, buffer.getvalue())
