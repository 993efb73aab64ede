"""Pairs of images before a judge: each pair is shown in both orders.

A judge may prefer what it sees first. Where its two answers differ, the pair is a tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from deradiff.evaluation.asking import Row, ask_each, judge_errors
from deradiff.evaluation.manifest import SAMPLING_COLUMNS
from deradiff.evaluation.pairing import MODEL_COLUMNS, Cell, SampledModel
from deradiff.evaluation.scoring import ReadImage
from deradiff.evaluation.shared_work import SharedWork, process_state
from deradiff.evaluation.statistics import Array
from deradiff.image_files import read_image
from deradiff.progress import progress_bar
from deradiff.scorers.answers import TIE
from deradiff.scorers.cache import ScoreCache, ScoreKey, score_key
from deradiff.scorers.pairwise import ModelPairwiseJudge

PAIRWISE = "pairwise"
"""The label of the judge of pairs."""

REFERENCE = "reference"

ORDERS = ((0, 1), (1, 0))
"""In which a judge sees two images."""

JUDGEMENTS = "judgements.parquet"
"""The file of what a judge of pairs prefers."""


class PairJudging:
    """A judge of pairs at work. Processes share the pairs.

    Pairs are rows with `file_0`, `sha256_0`, `file_1`, `sha256_1` and `prompt`.

    Args:
        judge: of the pairs.
        cache: the folder of the scores of all runs.
    """

    def __init__(self, judge: ModelPairwiseJudge, cache: Path) -> None:
        self.judge = judge
        self.cache = ScoreCache(cache, judge)
        judge.client.divide(process_state().num_processes)

    def open_questions(self, pairs: pd.DataFrame) -> int:
        """How many questions about pairs the cache has no answer to."""
        wanted = {key for (key,) in _questions(pairs)["keys"]}
        return len(wanted - set(self.cache.scores))

    def try_out(self) -> None:
        """Ask the server one question, so that what is wrong with it shows now.

        Raises:
            ValueError: where it cannot be asked.
        """
        with judge_errors(PAIRWISE):
            self.judge.try_out(images=2)

    def prefer(self, pairs: pd.DataFrame, read: ReadImage = read_image) -> pd.DataFrame:
        """Which image of each pair the judge prefers.

        Args:
            pairs: of images.
            read: the image of a file.

        Returns:
            The pairs, with `in_order` (1: it prefers image 0, 0: image 1, 0.5: neither), `swapped`
            (the same, seen in the other order), `preference` (0.5 where these two differ), and what
            the judge states of itself: `judge`, `version`, `scale` and `preprocessing`. In
            processes other than the main one, some may lack their preference.

        Raises:
            ValueError: where the judge gives no answer about a pair, or cannot be asked.
        """
        questions = _questions(pairs)
        is_shown = process_state().is_main_process
        bar = progress_bar(len(questions), PAIRWISE, "question", is_shown=is_shown)
        with judge_errors(PAIRWISE), bar as progress:
            answers = _Asking(self.judge, self.cache, progress, read).complete(questions)
        judge = f"{self.judge.endpoint.model}, rubric {self.judge.rubric.name}"
        return pairs.assign(
            **_preferences(pairs, answers),
            judge=judge,
            version=self.judge.version,
            scale=self.judge.scale,
            preprocessing=self.judge.preprocessing,
        )


class _Asking(SharedWork):
    """A judge's answers about pairs, each in both orders, several at once.

    Args:
        judge: the judge.
        cache: of its answers.
        progress: over pairs.
        read: the image of a file.
    """

    def __init__(
        self, judge: ModelPairwiseJudge, cache: ScoreCache, progress: tqdm, read: ReadImage
    ) -> None:
        super().__init__(cache, progress)
        self.judge = judge
        self.read = read

    def compute_all(self, things: pd.DataFrame) -> None:
        """Ask questions."""

        def prefer(question: Row) -> float:
            first = self.read(question["first"])
            second = self.read(question["second"])
            return self.judge.prefer(first, second, question["prompt"])

        rows = things.assign(
            key=[key for (key,) in things["keys"]],
            about=things["first"] + " and " + things["second"],
        )
        ask_each(self.judge, prefer, rows.to_dict("records"), self.cache, self.progress)


def _questions(pairs: pd.DataFrame) -> pd.DataFrame:
    """The questions about pairs, two for each; of two images that are one there is none.

    Returns:
        A row a question: `keys`, a tuple of its key in the cache, `first` and `second`, the files
        in the order in which they are shown, and `prompt`.
    """
    questions = []
    for pair in pairs.to_dict("records"):
        if pair["sha256_0"] == pair["sha256_1"]:
            continue
        for first, second in ORDERS:
            question = {
                "keys": (_key(pair, first, second),),
                "first": pair[f"file_{first}"],
                "second": pair[f"file_{second}"],
                "prompt": pair["prompt"],
            }
            questions.append(question)
    return pd.DataFrame(questions, columns=["keys", "first", "second", "prompt"])


def _preferences(pairs: pd.DataFrame, answers: Mapping[ScoreKey, float]) -> dict[str, Array]:
    """What the answers say of pairs. One image is as good as itself."""
    in_order = []
    swapped = []
    for pair in pairs.to_dict("records"):
        if pair["sha256_0"] == pair["sha256_1"]:
            in_order.append(TIE)
            swapped.append(TIE)
        else:
            in_order.append(answers.get(_key(pair, 0, 1), np.nan))
            swapped.append(1 - answers.get(_key(pair, 1, 0), np.nan))
    preference = np.where(np.equal(in_order, swapped), in_order, TIE)
    return {
        "in_order": np.array(in_order),
        "swapped": np.array(swapped),
        "preference": preference,
    }


def _key(pair: Row, first: int, second: int) -> ScoreKey:
    """The key of a question in the cache, of two images in an order."""
    images = f"{pair[f'sha256_{first}']}-{pair[f'sha256_{second}']}"
    return score_key(images, pair["prompt"])


def pairs_of_models(
    samples: pd.DataFrame, cells: Sequence[Cell], against: Sequence[str] = (REFERENCE,)
) -> pd.DataFrame:
    """The pairs of images that realigned models are judged by.

    Args:
        samples: of `read_samples`.
        cells: the realigned models that have a target, mixtures among them.
        against: of `deradiff.scorers.spec.AGAINST`. The reference meets every realigned model;
            target and anchor meet those of the cells.

    Returns:
        A row a pair: `against`, the columns of the realigned model, `beta_target`, `prompt_id`,
        `seed`, `prompt`, and image 0, the realigned model's, and image 1 as `PairJudging` takes
        them.
    """
    images = {}
    for values, rows in samples.groupby(MODEL_COLUMNS, sort=False):
        images[SampledModel(*values)] = rows.drop_duplicates(["prompt_id", "seed"])
    tables = []
    for model, other, name in _meetings(samples, cells, against):
        own = images[model].rename(columns={"file": "file_0", "sha256": "sha256_0"})
        their = images[other].rename(columns={"file": "file_1", "sha256": "sha256_1"})
        their = their[["prompt_id", "seed", "file_1", "sha256_1"]]
        pairs = own.merge(their, on=["prompt_id", "seed"]).assign(against=name)
        tables.append(pairs[PAIR_COLUMNS])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=PAIR_COLUMNS)


PAIR_COLUMNS = [
    "against",
    *MODEL_COLUMNS,
    "beta_target",
    "prompt_id",
    "seed",
    "prompt",
    "file_0",
    "sha256_0",
    "file_1",
    "sha256_1",
]


def _meetings(
    samples: pd.DataFrame, cells: Sequence[Cell], against: Sequence[str]
) -> list[tuple[SampledModel, SampledModel, str]]:
    """Which models meet: the realigned one, the other one, and what that is."""
    meetings = []
    if REFERENCE in against:
        references = _references(samples)
        realigned = samples[samples["realigned"] & (samples["lam"] != 0)]
        for row in realigned.drop_duplicates(MODEL_COLUMNS).to_dict("records"):
            model = SampledModel.of_row(row)
            if model.sampling in references:
                meetings.append((model, references[model.sampling], REFERENCE))
    for name in against:
        for cell in cells:
            other = None if name == REFERENCE else getattr(cell, name)
            if other is not None:
                meetings.append((cell.realigned, other, name))
    return meetings


def _references(samples: pd.DataFrame) -> dict[tuple[object, ...], SampledModel]:
    """The reference of each way of sampling: all anchors share it."""
    rows = samples[samples["lam"] == 0].drop_duplicates(SAMPLING_COLUMNS)
    models = [SampledModel.of_row(row) for row in rows.to_dict("records")]
    return {model.sampling: model for model in models}
