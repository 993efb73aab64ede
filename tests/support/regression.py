"""A tiny objective for tests of the loop: a linear model whose example is its index."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from deradiff.data.pairs import Examples, Item
from deradiff.training.loop import train
from deradiff.training.options import TrainingOptions


class Regression:
    """Enough to see order, accumulation and resume.

    Attributes:
        seen: the indices of all examples that `loss` got, in order.
        stop_at: the number of examples after which `loss` raises KeyboardInterrupt; None: never.
        prepared: how many examples had been seen before each checkpoint.
    """

    def __init__(self, stop_at: int | None = None):
        torch.manual_seed(0)
        self.network = nn.Linear(3, 1)
        self.frozen = []
        self.seen = []
        self.prepared = []
        self.stop_at = stop_at

    def collate(self, items: list[Item]):
        x = torch.stack([torch.randn(3, generator=item.generator) for item in items])
        index = torch.tensor([item.index for item in items])
        return {"x": x, "y": x.sum(1, keepdim=True), "index": index}

    def prepare_checkpoint(self):
        self.prepared.append(len(self.seen))

    def loss(self, network, batch):
        self.seen += batch["index"].tolist()
        if self.stop_at is not None and len(self.seen) > self.stop_at:
            raise KeyboardInterrupt
        return (network(batch["x"]) - batch["y"]).square().mean(), {"twice": torch.tensor(2.0)}


class Rows:
    """Data without content: the loop itself asks only how much there is."""

    replacement = staticmethod(lambda index: index)

    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count


def examples(count: int = 10) -> Examples:
    """The examples of `Regression`."""
    return Examples(Rows(count), seed=0)


def options(**changes) -> TrainingOptions:
    """Twelve steps of four examples, a checkpoint every five."""
    usual = {
        "steps": 12,
        "pairs_per_step": 4,
        "batch_size": 4,
        "learning_rate": 0.05,
        "checkpoint_every": 5,
        "log_every": 2,
    }
    return TrainingOptions(**(usual | changes))


def weights(objective) -> torch.Tensor:
    """All weights of an objective's network as one vector."""
    return torch.cat([p.detach().flatten() for p in objective.network.parameters()])


def train_until(run_dir: Path, data: Examples, stop_at: int | None = None) -> Regression:
    """Four steps of four micro-batches on CPU ranks, or fewer, where a rank stops the run.

    Args:
        run_dir: the run directory, where the run goes on.
        data: its examples.
        stop_at: the number of examples after which a rank raises; None: none does.
    """
    objective = Regression(stop_at)
    run = options(steps=4, batch_size=1, ema=0.5, checkpoint_every=2, log_every=1)
    with suppress(KeyboardInterrupt):
        train(objective, data, run, run_dir, Accelerator(cpu=True))
    return objective
