"""Micro-batches in the order that a run's seed fixes, from any step on."""

from __future__ import annotations

import multiprocessing

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deradiff.data.pairs import Examples
from deradiff.training.objectives import Batch, Objective
from deradiff.training.optimizers import TrainingOptions


class MicroBatches(Dataset):
    """Micro-batch i of this process, from step `first` on; collated by the objective."""

    def __init__(
        self,
        objective: Objective,
        examples: Examples,
        options: TrainingOptions,
        first: int,
        accelerator: Accelerator,
    ) -> None:
        self.objective, self.examples, self.options, self.first = (
            objective,
            examples,
            options,
            first,
        )
        self.rank, self.world = accelerator.process_index, accelerator.num_processes

    def __len__(self) -> int:
        return (self.options.steps - self.first) * self.options.accumulation

    def __getitem__(self, i: int) -> Batch:
        o = self.options
        start = ((self.first * o.accumulation + i) * self.world + self.rank) * o.batch_size
        return self.examples.batch(
            self.objective.collate, self.examples.places(start, start + o.batch_size)
        )


def loader(
    objective: Objective,
    examples: Examples,
    options: TrainingOptions,
    step: int,
    accelerator: Accelerator,
) -> DataLoader:
    batches = MicroBatches(objective, examples, options, step, accelerator)
    # Workers inherit the objective by fork: accelerate's wrapped networks cannot be sent to a fresh process.
    workers = options.workers if "fork" in multiprocessing.get_all_start_methods() else 0
    context = "fork" if workers else None
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=workers > 0,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()
    }
