"""Numbers of images that the processes of one command compute together, each number once.

What was computed before, by any run, lies in a cache. After a kill, the same call goes on where it
stopped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from tqdm import tqdm

from deradiff.scorers.cache import ScoreCache, ScoreKey


def process_state() -> PartialState:
    """This process among those of torchrun or accelerate launch; alone it is the main process."""
    return PartialState(cpu=not torch.cuda.is_available())


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
