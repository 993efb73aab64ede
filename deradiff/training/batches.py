"""The micro-batches of a run, from any step on: their order is fixed by the seed."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deradiff.data.pairs import Examples
from deradiff.training.objectives.base import Batch, Objective
from deradiff.training.options import TrainingOptions
from deradiff.training.preemption import SIGNALS
from deradiff.training.shares import Shares


class MicroBatches(Dataset):
    """The micro-batches of this process, collated by the objective.

    Args:
        objective: collates examples.
        examples: gives them in the order of the run.
        shares: which of them are this process's.
        steps: the first step, to which micro-batch 0 belongs, and the end of the run.
        rank: of this process.
    """

    def __init__(
        self,
        objective: Objective,
        examples: Examples,
        shares: Shares,
        steps: range,
        rank: int,
    ) -> None:
        self.objective = objective
        self.examples = examples
        self.shares = shares
        self.steps = steps
        self.rank = rank

    def __len__(self) -> int:
        return len(self.steps) * self.shares.accumulation

    def __getitem__(self, number: int) -> Batch | Exception:
        """A micro-batch, or what its data raises: a worker's exception would lose its message."""
        try:
            return self._micro_batch(number)
        except (ValueError, OSError) as error:
            return error

    def _micro_batch(self, number: int) -> Batch:
        step, turn = divmod(number, self.shares.accumulation)
        start = self.shares.start(self.steps[step], turn, self.rank)
        epoch_indices = self.examples.epoch_indices(start, start + self.shares.batch_size)
        # `Examples.batch` collates, because it must be able to replace a broken image.
        return self.examples.batch(self.objective.collate, epoch_indices)


def micro_batches(
    objective: Objective,
    examples: Examples,
    options: TrainingOptions,
    shares: Shares,
    first_step: int,
    accelerator: Accelerator,
) -> Iterator[Batch]:
    """The micro-batches of this process from a step on; see `MicroBatches`.

    Raises:
        ValueError: where data cannot be read, and where a worker has died.
        OSError: where data cannot be read.
    """
    steps = range(first_step, options.steps)
    batches = MicroBatches(objective, examples, shares, steps, accelerator.process_index)
    # Workers inherit the objective by fork: accelerate's wrapped networks cannot be sent to a
    # process that starts afresh.
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    workers = options.workers if can_fork else 0
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals_to_the_run,
        # Copies from pinned memory to a GPU do not hold this process up.
        pin_memory=accelerator.device.type == "cuda",
    )
    return _raised(iter(loader))


def _raised(loaded: Iterator[Batch | Exception]) -> Iterator[Batch]:
    """Micro-batches; an exception among them is raised."""
    while True:
        try:
            batch = next(loaded)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ValueError(
                "a process that loads data was killed, mostly for want of memory: start fewer "
                "workers, or none, and the same command goes on"
            ) from error
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and a cluster's signals go to all processes of a run; its loop decides when to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device, also those inside of dictionaries."""
    moved: Batch = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            value = value.to(device, non_blocking=True)
        elif isinstance(value, dict):
            value = to_device(value, device)
        moved[name] = value
    return moved
