"""Preference pairs without human labels: pictures of one caption, compared by a scorer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from deradiff.data.pairs import CaptionedImages
from deradiff.data.tables import encode_png, write_pair_table
from deradiff.scorers.base import Scorer

BATCH = 256


def write_scored_pairs(path: Path, images: CaptionedImages, count: int, score: Scorer, seed: int = 0) -> None:
    """Draw `count` pairs of different pictures that share a caption, let the scorer say which is preferred, and write Pick-a-Pic's columns.

    Equal scores are ties (label .5).
    Raises ValueError where no caption has two pictures.
    """
    rng = np.random.default_rng(seed)
    by_caption: dict[str, list[int]] = {}
    for index, caption in enumerate(images.captions):
        by_caption.setdefault(caption, []).append(index)
    groups = [rows for rows in by_caption.values() if len(rows) > 1]
    if not groups:
        raise ValueError(f"{images.source} has no caption with two pictures, so there is nothing to compare")
    share = np.array([len(rows) for rows in groups]) / sum(len(rows) for rows in groups)
    chosen = [rng.choice(groups[g], 2, replace=False) for g in rng.choice(len(groups), count, p=share)]
    first, second, labels, captions = [], [], [], []
    for start in tqdm(range(0, count, BATCH), desc=f"labelling pairs by {score.name}", unit="batch"):
        rows = chosen[start : start + BATCH]
        texts = [images.captions[int(a)] for a, _ in rows]
        sides = [[images.pictures(int(pair[side]))[0] for pair in rows] for side in (0, 1)]
        difference = score(sides[0], texts) - score(sides[1], texts)
        labels += ((difference.sign() + 1) / 2).tolist()
        first += [encode_png(i) for i in sides[0]]
        second += [encode_png(i) for i in sides[1]]
        captions += texts
    write_pair_table(path, first, second, labels, captions)
