"""Judges behind servers, asked about many images: each answer is kept as it comes.

An interruption costs no more than the answers that were under way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from deradiff.scorers.cache import ScoreCache
from deradiff.scorers.chat import NoAnswer
from deradiff.scorers.judge import ModelJudge

Notify = Callable[[str], None]
"""Takes a sentence for the user."""

Row = dict[str, Any]


class JudgeError(ValueError):
    """A judge that could not be asked, or gave no answer.

    Attributes:
        label: of the judge.
    """

    def __init__(self, label: str, message: str) -> None:
        super().__init__(message)
        self.label = label


@contextmanager
def judge_errors(label: str) -> Iterator[None]:
    """Raises JudgeError in place of the block's ValueError.

    Args:
        label: of the judge that is asked in the block.
    """
    try:
        yield
    except ValueError as error:
        raise JudgeError(label, str(error)) from error


@contextmanager
def report_usage(judges: Mapping[str, ModelJudge], notify: Notify) -> Iterator[None]:
    """Say in the end what was asked of judges and what it cost, also where it was interrupted.

    Args:
        judges: who is asked in the block, by label.
        notify: takes a sentence for each that was asked.
    """
    try:
        yield
    finally:
        for label, judge in judges.items():
            usage = judge.client.usage
            if usage.answers or usage.repeats:
                notify(f"{label}: {usage.sentence(judge.endpoint)}")


def ask_each(
    judge: ModelJudge,
    question: Callable[[Row], float],
    rows: Sequence[Row],
    cache: ScoreCache,
    progress: tqdm,
) -> None:
    """Ask a judge about each row, several at once.

    Args:
        judge: who is asked.
        question: asks about one row, and gives what the answer is worth.
        rows: each with its `key` in the cache, and `about`, what the question is about.
        cache: of the answers.
        progress: of the rows.

    Raises:
        ValueError: where there is no answer about a row, which is named, or the server cannot be
            asked. Answers that have come are kept.
    """
    lock = threading.Lock()

    def ask_about(row: Row) -> None:
        try:
            value = question(row)
        except NoAnswer as error:
            raise ValueError(f"no answer about {row['about']}: {error}") from error
        with lock:
            cache.add([row["key"]], [value])
            progress.update(1)
            progress.set_postfix_str(judge.client.usage.amount(judge.endpoint), refresh=False)

    judge.client.for_each(ask_about, rows)
