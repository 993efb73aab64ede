"""The largest batch size that memory allows, held against an allocator with a limit."""

from functools import partial

import pytest
import torch
from accelerate import Accelerator

from deradiff.training.batch_size import attempt, batch_sizes, largest_that_fits
from tests.support.regression import Regression, examples, weights


class Limited(Regression):
    """Runs out of memory with more than so many examples at once."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit
        self.tried = []

    def loss(self, network, batch):
        self.tried.append(len(batch["index"]))
        if self.tried[-1] > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        noise = torch.rand(1)
        loss, terms = super().loss(network, batch)
        return loss * noise, terms


def fitting(objective, sizes):
    """The largest batch size of an objective."""
    accelerator = Accelerator(cpu=True)
    return largest_that_fits(sizes, partial(attempt, objective, examples(), accelerator, 64.0))


@pytest.mark.parametrize(
    "pairs, ranks, sizes",
    [
        (2048, 16, [128, 64, 32, 16, 8, 4, 2, 1]),
        (2048, 1024, [2, 1]),
        (48, 4, [4, 2, 1]),
        (15, 3, [1]),
        # Seven nodes: of batches of 16, a quarter would be spare.
        (2048, 56, [8, 4, 2, 1]),
    ],
)
def test_batch_sizes_are_powers_of_two_that_ranks_can_share(pairs, ranks, sizes):
    assert batch_sizes(pairs, ranks) == sizes


@pytest.mark.parametrize("limit, size", [(16, 16), (5, 4), (1, 1)])
def test_batch_sizes_are_tried_downwards_until_one_fits(limit, size):
    objective = Limited(limit)
    before = weights(objective)
    state = torch.get_rng_state()
    assert fitting(objective, [16, 8, 4, 2, 1]) == size

    # Nothing has changed, and what fits was tried with the gradients of a pass before.
    assert torch.equal(weights(objective), before)
    assert all(p.grad is None for p in objective.network.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert objective.tried[-2:] == [size, size]


def test_a_batch_that_never_fits_is_refused():
    with pytest.raises(ValueError, match="batch_size=1 does not fit into the device's memory"):
        fitting(Limited(0), [2, 1])


def test_an_error_that_is_not_about_memory_is_not_taken_for_one():
    class Broken(Regression):
        def loss(self, network, batch):
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        fitting(Broken(), [2, 1])
