"""People's votes on pairs of images, and which images scorers prefer of the same pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from deradiff.evaluation.asking import Notify
from deradiff.evaluation.scoring import score_images
from deradiff.image_files import UnreadableImage, decode_image
from deradiff.image_tables import encoded_image
from deradiff.scorers.spec import ScorerSpec
from deradiff.terminal import say

VOTES = "votes.parquet"
"""The file of what scorers prefer, beside people."""

COLUMNS = ("jpg_0", "jpg_1", "label_0", "caption")
"""Of Pick-a-Pic: two images, which of them was preferred, and their prompt."""

HAS_LABEL = "has_label"
"""Where Pick-a-Pic says no, label_0 means nothing."""

LABELS = (0, 0.5, 1)


@dataclass(frozen=True)
class Votes:
    """People's votes, each on two images of one prompt.

    Attributes:
        path: the table's file.
        table: a row a vote: `row` of the file, `prompt`, `label` (1: the first image is preferred,
            0: the second, 0.5: neither), `file_0`, `sha256_0`, `file_1` and `sha256_1`; the names
            of the images are not those of files.
        contents: the encoded images, by their names.
    """

    path: str
    table: pd.DataFrame
    contents: Mapping[str, bytes]

    def image(self, name: str) -> Image.Image:
        """The image of a name in the table.

        Raises:
            ValueError: where it cannot be decoded.
        """
        try:
            return decode_image(self.contents[name])
        except UnreadableImage as error:
            raise ValueError(f"{name} is no image that can be read: {error}") from error

    def images(self) -> pd.DataFrame:
        """A row an image: `row`, `side`, `prompt`, `file` (its name) and `sha256`."""
        sides = []
        for side in (0, 1):
            names = {f"file_{side}": "file", f"sha256_{side}": "sha256"}
            images = self.table.rename(columns=names)[["row", "prompt", "file", "sha256"]]
            sides.append(images.assign(side=side))
        return pd.concat(sides, ignore_index=True)


def read_votes(path: str | Path) -> Votes:
    """Read people's votes.

    Args:
        path: a parquet file with the columns of Pick-a-Pic.

    Raises:
        ValueError: where it is none, or holds no vote.
    """
    columns = _columns_of(path)
    captions = columns["caption"]
    labels = columns["label_0"]
    has_label = columns.get(HAS_LABEL, [True] * len(labels))
    rows = []
    contents: dict[str, bytes] = {}
    for row, (caption, label, is_labelled) in enumerate(zip(captions, labels, has_label)):
        if not is_labelled or label is None or label != label:
            continue
        if label not in LABELS or not isinstance(caption, str) or not caption.strip():
            raise ValueError(
                f"{path}: row {row} has label_0 {label!r} and caption {str(caption)[:40]!r}: give "
                "1 where the first image is preferred, 0 where the second is, 0.5 for neither, and "
                "a text"
            )
        vote: dict[str, Any] = {"row": row, "prompt": caption, "label": float(label)}
        for side in (0, 1):
            name = f"{path}: jpg_{side} of row {row}"
            encoded = _encoded(columns[f"jpg_{side}"][row], name)
            contents[name] = encoded
            digest = hashlib.sha256(encoded).hexdigest()
            vote |= {f"file_{side}": name, f"sha256_{side}": digest}
        rows.append(vote)
    if not rows:
        raise ValueError(f"{path} holds no vote: label_0 is empty in every row")

    # What is wrong with all images shows now
    votes = Votes(str(path), pd.DataFrame(rows), contents)
    for side in (0, 1):
        votes.image(rows[0][f"file_{side}"])
    return votes


def _columns_of(path: str | Path) -> dict[str, list[Any]]:
    """The columns of a table of votes. Raises ValueError."""
    try:
        present = pq.read_schema(path).names
        missing = [name for name in COLUMNS if name not in present]
        if missing:
            raise ValueError(
                f"{path} lacks the column {', '.join(missing)}: give votes in the columns of "
                f"Pick-a-Pic, {', '.join(COLUMNS)}"
            )
        wanted = [name for name in (*COLUMNS, HAS_LABEL) if name in present]
        return pq.read_table(path, columns=wanted).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no parquet file that can be read: {error}") from error


def _encoded(cell: Any, name: str) -> bytes:
    try:
        return encoded_image(cell)
    except UnreadableImage as error:
        raise ValueError(f"{name} is no image: {error}") from error


def score_votes(
    votes: Votes,
    scorers: Mapping[str, ScorerSpec],
    batch_size: int,
    cache: Path,
    notify: Notify = say,
) -> pd.DataFrame | None:
    """Which image of each vote each scorer prefers.

    Args:
        votes: of people.
        scorers: by label.
        batch_size: images scored at once.
        cache: the folder of the scores of all runs.
        notify: takes a sentence on what judges behind servers were asked.

    Returns:
        A row per vote and scorer: `scorer`, `row`, `prompt`, `label` and `preference`, which is 1
        for the first image, 0 for the second one, 0.5 for a tie. Processes other than the main one
        get None.

    Raises:
        ValueError: as `score_images`.
    """
    images = votes.images()
    scores = score_images(images, scorers, batch_size, cache, notify, votes.image)
    if scores is None:
        return None
    tables = []
    for label in scorers:
        own = scores[scores["scorer"] == label]
        by_side = own.pivot(index="row", columns="side", values="score").loc[votes.table["row"]]
        preference = (np.sign(by_side[0] - by_side[1]).to_numpy() + 1) / 2
        table = votes.table[["row", "prompt", "label"]]
        tables.append(table.assign(scorer=label, preference=preference))
    return pd.concat(tables, ignore_index=True)
