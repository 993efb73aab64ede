"""`optim.batch_size=auto`: the batch size that fits into a device."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from configs.checks import section
from deradiff.data.pairs import Examples
from deradiff.digests import sealed, unsealed
from deradiff.files import write_atomic
from deradiff.models.base_model import BaseModel
from deradiff.models.requirements import SINGLE, optimizer_bytes
from deradiff.terminal import say
from deradiff.training.batch_size import attempt, batch_sizes, largest_that_fits
from deradiff.training.objectives.base import Objective
from train.config import AUTO, TrainConfig
from train.estimate import device_overhead, step_requirements

CHOSEN = "batch_size.json"
CPU_SHARE = 0.5  # of the free memory, since nothing is tried and others need some of it


def with_batch_size(config: TrainConfig, size: int) -> TrainConfig:
    """The config with a batch size in place of `auto`."""
    return replace(config, optim=replace(config.optim, batch_size=size))


def sizes_that_may_fit(
    config: TrainConfig, base: BaseModel, ranks: int, memory: float
) -> list[int]:
    """The batch sizes whose estimate fits into a device's memory, the largest first.

    The smallest size is always among them.
    """
    # What grows with the batch does so evenly.
    one, two = (step_requirements(with_batch_size(config, n), base) for n in (1, 2))
    growth = two.activations - one.activations
    fixed = one.held + one.gradients + device_overhead(config)
    fitting = []
    for size in batch_sizes(config.optim.pairs_per_step, ranks):
        work = max(one.activations + (size - 1) * growth, one.update)
        if fixed + work <= memory:
            fitting.append(size)
    return fitting or [1]


def check_auto(config: TrainConfig, accelerator: Accelerator) -> None:
    """Refuse to choose a batch size for a network that lies in shards.

    Raises:
        ValueError: where it does.
    """
    shards = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if config.optim.batch_size == AUTO and accelerator.distributed_type in shards:
        raise ValueError(
            "optim.batch_size=auto tries the whole network on one device, and this run splits it "
            "over several: give optim.batch_size=<number>"
        )


def choose_batch_size(
    config: TrainConfig,
    base: BaseModel,
    objective: Objective,
    examples: Examples,
    run_dir: Path,
    accelerator: Accelerator,
) -> int:
    """The batch size of `optim.batch_size=auto`, the same on all ranks; collective.

    A run that goes on takes the one that it had. A GPU tries those that may fit, downwards. On a
    CPU, where a process that asks for too much may be killed, the estimate decides.

    Raises:
        ValueError: where not even the smallest fits.
    """
    # What the run had, unless so many ranks cannot share it.
    ranks = accelerator.num_processes
    had = _agreed(_recorded(run_dir), accelerator)
    if had and had in batch_sizes(config.optim.pairs_per_step, ranks):
        say(
            f"train: batches of {had} pairs, as this run has begun",
            is_main=accelerator.is_main_process,
        )
        return had

    # What fits here.
    sizes = sizes_that_may_fit(config, base, ranks, device_memory(accelerator.device))
    chosen = sizes[0]
    how = "by the estimate and the free memory"
    if accelerator.device.type != "cpu":
        reserved = _reserved_bytes(config, objective, ranks)
        with section("optim"):
            chosen = largest_that_fits(
                sizes, partial(attempt, objective, examples, accelerator, reserved)
            )
        how = f"the most that fit, of {sizes[0]} at most by the estimate"

    # The smallest of all ranks, whose devices may differ.
    chosen = _agreed(chosen, accelerator)
    say(
        f"train: optim.batch_size=auto: batches of {chosen} pairs, {how}",
        is_main=accelerator.is_main_process,
    )
    if accelerator.is_main_process:
        write_atomic(run_dir / CHOSEN, json.dumps(sealed({"batch_size": chosen})))
    return chosen


def device_memory(device: torch.device) -> float:
    """Bytes that a run may take: of a GPU all, of a machine a share of what is free, by rank."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return CPU_SHARE * psutil.virtual_memory().available / ranks_here


def _recorded(run_dir: Path) -> int:
    """The batch size that the run has begun with; 0: none, or none that can be read."""
    try:
        return int(unsealed(json.loads((run_dir / CHOSEN).read_text()))["batch_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _agreed(number: int, accelerator: Accelerator) -> int:
    """The smallest of all ranks' numbers; collective."""
    own = torch.tensor([number], device=accelerator.device)
    numbers: Tensor = accelerator.gather(own)
    return int(numbers.min())


def _reserved_bytes(config: TrainConfig, objective: Objective, ranks: int) -> float:
    """What a run holds besides weights, gradients and a batch: for each trained number."""
    trained = [p for p in objective.network.parameters() if p.requires_grad]
    copies = 1  # that an optimiser makes while it steps
    copies += ranks > 1  # DDP's buckets of gradients
    copies += config.optim.ema > 0
    own = copies * SINGLE * sum(p.numel() for p in trained)
    name = config.optim.name
    counted = "adamw8bit" if name.startswith("adamw8bit") else name
    return own + optimizer_bytes([p.shape for p in trained], counted)
