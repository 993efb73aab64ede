"""DeepSpeed's ZeRO: what a run's options are to it, and its parts as whole tensors.

ZeRO 1 and 2 split the optimiser's state over the ranks, ZeRO 3 the weights as well. DeepSpeed keeps
a float32 copy of the weights, the masters, in one flat tensor of each group, and every rank holds a
part of it.
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed
from transformers.integrations import unset_hf_deepspeed_config

from deradiff.training.options import TrainingOptions

STAGES = (1, 2, 3)
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of the shape of the weight


def asked_for() -> bool:
    """Whether this process was launched to train with DeepSpeed, as accelerate tells it."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def check_deepspeed(optimizer: str, precision: str) -> None:
    """Check that DeepSpeed can train so.

    Args:
        optimizer: a name of `deradiff.training.options.OPTIMIZERS`.
        precision: no, fp16 or bf16.

    Raises:
        ValueError: for what cannot be split, and for fp16.
    """
    if optimizer != "adamw":
        raise ValueError(
            f"DeepSpeed cuts the weights into flat parts, which {optimizer} would train in another "
            "way: take the optimiser adamw, whose state it splits over the ranks"
        )
    if precision == "fp16":
        raise ValueError("with DeepSpeed the precision can be no or bf16, not fp16: take bf16")


def check_config(config: dict[str, Any]) -> None:
    """Check a config of DeepSpeed's.

    Args:
        config: as DeepSpeed's own JSON file has it.

    Raises:
        ValueError: for a stage that splits nothing, and for an offload to NVMe.
    """
    split = config["zero_optimization"]
    if split["stage"] not in STAGES:
        raise ValueError(f"ZeRO {split['stage']} splits nothing: take 1, 2 or 3")
    for name in ("offload_optimizer", "offload_param"):
        if split.get(name, {}).get("device") == "nvme":
            raise ValueError(f"{name} cannot be nvme here: take cpu or none")


def load_networks_whole() -> None:
    """Keep transformers from splitting the networks that it loads, as it does under ZeRO 3.

    One rank alone encodes the data, and would wait for the parts of the others for ever. To be
    called after the accelerator was made.
    """
    unset_hf_deepspeed_config()


class Zero:
    """DeepSpeed in a run.

    Args:
        accelerator: of the run, before it has wrapped the network.
        options: of the run.

    Raises:
        ValueError: for what `check_deepspeed` and `check_config` refuse.
    """

    def __init__(self, accelerator: Accelerator, options: TrainingOptions) -> None:
        self.device = accelerator.device
        config = accelerator.deepspeed_plugin.deepspeed_config
        check_deepspeed(options.optimizer, accelerator.mixed_precision)
        check_config(config)

        # What is said in the run's options counts, whatever DeepSpeed's own file says.
        config["train_micro_batch_size_per_gpu"] = options.batch_size
        config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
        config["train_batch_size"] = "auto"
        config["gradient_clipping"] = options.max_norm if math.isfinite(options.max_norm) else 0.0

        # bf16 is autocast here as without DeepSpeed, so that the weights stay in float32. Gradients
        # are added up in float32 too: no layer is "safe" for less.
        self.bf16 = accelerator.mixed_precision == "bf16"
        if self.bf16:
            config["bf16"] = {"enabled": False}
            config["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of a forward pass; the frozen networks round as the trained one does."""
        if self.bf16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


@torch.no_grad()
def load_weights(engine: Any, weights: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy whole tensors into the weights and their masters, in place, on every rank.

    Args:
        engine: the network as DeepSpeed wrapped it.
        weights: the trained weights by name.
        values: whole tensors, with the same names.
    """
    # An optional package, which is there where an engine is.
    from deepspeed.runtime.zero import GatheredParameters

    for name, weight in weights.items():
        # Of a split weight rank 0 writes the whole.
        with GatheredParameters([weight], modifier_rank=0):
            weight.copy_(values[name])
    engine.optimizer.refresh_fp32_params()


def optimizer_state(engine: Any, weights: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The state of AdamW for each weight, as torch's own `state_dict` has it; collective.

    Args:
        engine: the network as DeepSpeed wrapped it.
        weights: the trained weights by name, in the order in which the optimiser got them.

    Returns:
        For each weight, by its position: the moments as whole tensors on the CPU, and the step.
    """
    # Every part of the masters counts the same steps.
    first = _masters(engine)[0]
    steps = float(engine.optimizer.optimizer.state[first]["step"])

    state = {}
    for position, weight in enumerate(weights.values()):
        state[position] = {name: _moment(weight, name).cpu() for name in MOMENTS}
        # A tensor for each: torch's AdamW counts in place.
        state[position]["step"] = torch.tensor(steps)
    return state


def _moment(weight: Tensor, name: str) -> Tensor:
    """A moment of a weight as a whole tensor; collective."""
    # An optional package, which is there where an engine is.
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    if is_split(weight):
        return whole(weight, safe_get_local_optimizer_state(weight, name))
    return safe_get_full_optimizer_state(weight, name)


@torch.no_grad()
def load_optimizer_state(
    engine: Any, weights: dict[str, Tensor], state: dict[int, dict[str, Tensor]]
) -> None:
    """Take up what `optimizer_state` returned; every rank takes its parts, in place."""
    # An optional package, which is there where an engine is.
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    # DeepSpeed makes the state with the first step; here it is needed before.
    zero = engine.optimizer
    step = state[0]["step"]
    is_torch = isinstance(zero.optimizer, torch.optim.AdamW)  # DeepSpeed's own counts in an int
    for master in _masters(engine):
        moments: dict[str, Any] = {name: torch.zeros_like(master) for name in MOMENTS}
        moments["step"] = step.clone() if is_torch else int(step)
        zero.optimizer.state[master] = moments
    if engine.zero_optimization_stage() < 3:
        zero._lazy_init_hp_params_optimizer_state()

    for position, weight in enumerate(weights.values()):
        for name in MOMENTS:
            value = state[position][name].to(weight.device)
            if is_split(weight):
                safe_set_local_optimizer_state(weight, part_of(weight, value), name)
            else:
                safe_set_full_optimizer_state(weight, value, name)


def _masters(engine: Any) -> list[Tensor]:
    """This rank's flat parts of the float32 weights, which the optimiser steps."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return zero.fp32_partitioned_groups_flat
    return zero.single_partition_of_fp32_groups


def is_split(weight: Tensor) -> bool:
    """Whether ZeRO 3 has split a weight; it is then empty where it is not in use."""
    return hasattr(weight, "ds_id")


def own_part(weight: Any) -> Tensor:
    """This rank's part of a split weight: flat, and of the same length on all ranks."""
    return weight.ds_tensor.data


def whole(weight: Any, part: Tensor) -> Tensor:
    """A whole tensor of the ranks' parts; collective.

    Args:
        weight: a split weight, whose shape it has.
        part: this rank's part of it, or of something that is split alike.
    """
    group = weight.ds_process_group
    own = part.to(weight.device).contiguous()
    parts = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, own, group)
    # The last part may be filled up.
    return torch.cat(parts)[: weight.ds_numel].view(weight.ds_shape)


def part_of(weight: Any, value: Tensor) -> Tensor:
    """This rank's part of a whole tensor that is split as a weight is."""
    size = weight.ds_tensor.numel()
    start = size * distributed.get_rank(weight.ds_process_group)
    own = value.flatten()[start : start + size]
    return torch.nn.functional.pad(own, (0, size - len(own)))
