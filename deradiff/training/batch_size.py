"""The largest batch size that memory allows, tried downwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from deradiff.data.pairs import Examples
from deradiff.training.batches import to_device
from deradiff.training.objectives.base import Objective
from deradiff.training.shares import Shares

MOST_SPARE = 0.1
"""Share of a step's forward passes that may be spare, for a larger batch."""


def batch_sizes(pairs_per_step: int, ranks: int) -> list[int]:
    """The powers of two into which the ranks can cut a step well, the largest first.

    Args:
        pairs_per_step: pairs of one optimiser step on all ranks.
        ranks: how many there are; not more than pairs.
    """
    sizes = [1]
    size = 2
    while pairs_per_step % size == 0 and size * ranks <= pairs_per_step:
        shares = Shares(pairs_per_step, size, ranks)
        if shares.spare <= MOST_SPARE * shares.accumulation * ranks:
            sizes.insert(0, size)
        size *= 2
    return sizes


def largest_that_fits(sizes: list[int], attempt: Callable[[int], None]) -> int:
    """The first batch size that is tried without running out of memory.

    Args:
        sizes: in the order in which they are tried.
        attempt: trains on so many pairs, and raises what the allocator raises.

    Raises:
        ValueError: where none fits.
    """
    for size in sizes:
        try:
            attempt(size)
            return size
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
    raise ValueError(
        f"batch_size={sizes[-1]} does not fit into the device's memory: take gradient "
        "checkpointing, an optimiser with a smaller state, or a LoRA"
    )


def attempt(
    objective: Objective,
    examples: Examples,
    accelerator: Accelerator,
    reserved: float,
    size: int,
) -> None:
    """Train on a batch as a step does, without changing what is trained.

    Args:
        objective: its networks are moved to the device.
        examples: the first ones are the batch.
        accelerator: of the run; its network is not wrapped yet.
        reserved: bytes of the device that a run holds besides, such as the optimiser's state.
        size: pairs of the batch.

    Raises:
        RuntimeError: of the allocator, where memory is too small.
    """
    # What a run holds all the time.
    device = accelerator.device
    for module in [*objective.frozen, objective.network]:
        module.to(device)
    objective.network.train()
    held = torch.empty(int(reserved), dtype=torch.uint8, device=device)
    batch = to_device(examples.batch(objective.collate, examples.epoch_indices(0, size)), device)

    # The second pass finds the gradients of the first, as passes of an accumulation do.
    try:
        with torch.random.fork_rng():
            for _ in range(2):
                with accelerator.autocast():
                    loss, _ = objective.loss(objective.network, batch)
                loss.backward()
    finally:
        objective.network.zero_grad(set_to_none=True)
        del held
