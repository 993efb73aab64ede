"""Numbers of images that the processes of one command compute together, each number once.

What was computed before, by any run, lies in a cache. After a kill, the same call goes on where it
stopped.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from deradiff.scorers.cache import ScoreCache, ScoreKey
from deradiff.training.ranks import TIMEOUT, Watch, gather_ranks

SHOWS_WITHIN = 10.0
"""Seconds within which a shared disk shows a new file to all machines."""


def watch(stage: str, kept: str) -> Watch:
    """A block in which no process waits for one that is lost; the first thing of a command.

    Args:
        stage: of the command.
        kept: what the command can go on from, in words.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Watch(gather_ranks(device, TIMEOUT), stage, lambda: kept)


def process_state() -> PartialState:
    """This process among those of torchrun or accelerate launch; alone it is the main process."""
    return PartialState(cpu=not torch.cuda.is_available())


def check_shared_disk(folder: Path, state: PartialState) -> None:
    """Check that all processes see the folder that they are about to fill; collective.

    Args:
        folder: of the run; it is made.
        state: this process among all.

    Raises:
        ValueError: in all processes, where one does not see what the main one has written.
    """
    if state.num_processes == 1:
        return
    folder.mkdir(parents=True, exist_ok=True)
    token = [uuid.uuid4().hex if state.is_main_process else ""]
    (name,) = broadcast_object_list(token)
    file = folder / f".seen-by-all-{name}"
    if state.is_main_process:
        file.touch()
    state.wait_for_everyone()

    # A disk of the network may show a new file late.
    end = time.monotonic() + SHOWS_WITHIN
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.1)
    seen = gather_object([file.exists()])
    if state.is_main_process:
        file.unlink()
    if not all(seen):
        blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        raise ValueError(
            f"process {blind} of {state.num_processes} does not see {folder}, which is on another "
            "machine: give runs=<a folder on a disk that all machines share>, or run on one machine"
        )


class SharedWork(ABC):
    """One kind of number of many things; a subclass computes it.

    Args:
        cache: of the numbers.
        progress: moves on by one with each thing.
    """

    def __init__(self, cache: ScoreCache, progress: tqdm) -> None:
        self.cache = cache
        self.progress = progress

    @abstractmethod
    def compute_all(self, things: pd.DataFrame) -> None:
        """Compute the numbers of things, and add them to the cache as they come."""

    def complete(self, things: pd.DataFrame) -> dict[ScoreKey, float]:
        """Compute what the cache lacks; the processes share it.

        Args:
            things: a row each, in whatever columns `compute_all` reads; `keys`: a tuple of the keys
                of its numbers.

        Returns:
            By key: in the main process every number, in the others perhaps without some.
        """
        state = process_state()
        missing = self._missing(things.drop_duplicates("keys"))
        self.progress.update(len(things) - len(missing))

        # Nobody writes before everybody has read, and so shares out the same rest
        state.wait_for_everyone()
        self.compute_all(missing.iloc[state.process_index :: state.num_processes])
        state.wait_for_everyone()

        # A file system may be slow to show what others wrote
        if state.is_main_process and state.num_processes > 1:
            self.cache.read()
            self.compute_all(self._missing(missing))
        return self.cache.scores

    def _missing(self, things: pd.DataFrame) -> pd.DataFrame:
        """The things of which the cache lacks a number."""
        is_missing = []
        for keys in things["keys"]:
            is_missing.append(any(key not in self.cache.scores for key in keys))
        # A mask: an empty list would select no columns
        return things[np.array(is_missing, dtype=bool)]


class BatchedWork(SharedWork):
    """Numbers that are computed batch by batch, each of which goes to the cache at once.

    Args:
        cache: of the numbers.
        batch_size: things at once.
        progress: moves on by one with each thing.
    """

    def __init__(self, cache: ScoreCache, batch_size: int, progress: tqdm) -> None:
        super().__init__(cache, progress)
        self.batch_size = batch_size

    @abstractmethod
    def compute(self, batch: pd.DataFrame) -> Mapping[ScoreKey, float]:
        """The numbers of at most `batch_size` things, by their keys."""

    def compute_all(self, things: pd.DataFrame) -> None:
        """Compute the numbers of things, a batch at a time."""
        for start in range(0, len(things), self.batch_size):
            batch = things.iloc[start : start + self.batch_size]
            numbers = self.compute(batch)
            self.cache.add(numbers.keys(), numbers.values())
            self.progress.update(len(batch))
