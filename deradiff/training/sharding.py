"""A network in training as a checkpoint sees it: whole tensors by name, wherever their shards lie."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from deradiff.training.objectives import Objective
from deradiff.training.optimizers import Average, TrainingOptions, make_optimizer

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Trained:
    """The objective's network and its optimiser as accelerate wrapped them: plain, DDP, FSDP2 or DeepSpeed.

    Collective: where the network is sharded, every rank calls `save`, `load` and `snapshot`.
    """

    def __init__(
        self, objective: Objective, options: TrainingOptions, accelerator: Accelerator
    ) -> None:
        self.objective, self.accelerator = objective, accelerator
        skeleton = empty_copy(objective.network)
        plugin = accelerator.state.deepspeed_plugin
        if (
            plugin is not None
        ):  # DeepSpeed asks for what it would have read off a data loader of accelerate's
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = options.batch_size
        optimizer = make_optimizer(
            [p for p in objective.network.parameters() if p.requires_grad], options
        )
        self.network, self.optimizer = accelerator.prepare(objective.network, optimizer)
        whole: nn.Module = accelerator.unwrap_model(self.network)
        self.weights: dict[str, Tensor] = {
            n: p for n, p in whole.named_parameters() if p.requires_grad
        }  # FSDP2 put shards in their place
        self.average = Average(self.weights, options.ema) if options.ema else None
        self.sharded = any(
            isinstance(p, DTensor) or hasattr(p, "ds_id") for p in self.weights.values()
        )
        self.skeleton = skeleton if self.sharded else None
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED

    def save(self, folder: Path) -> None:
        """Weights, their average and the optimiser, into a folder that exists; the main process writes, but for DeepSpeed's own state."""
        parts = {"weights": self.weights} | (
            {"average": self.average.weights} if self.average else {}
        )
        for name, tensors in parts.items():
            gathered = {key: gather(tensor) for key, tensor in tensors.items()}
            if self.accelerator.is_main_process:
                save_file(
                    {key: tensor.detach().cpu().contiguous() for key, tensor in gathered.items()},
                    folder / f"{name}.safetensors",
                )
        if self.deepspeed:
            self.network.save_checkpoint(folder, tag="deepspeed")
            return
        inner = self.optimizer.optimizer
        state = (
            get_optimizer_state_dict(self.network, inner, options=WHOLE)
            if self.sharded
            else inner.state_dict()
        )
        if self.accelerator.is_main_process:
            torch.save(state, folder / "optimizer.pt")
            if self.accelerator.scaler:
                torch.save(self.accelerator.scaler.state_dict(), folder / "scaler.pt")

    def load(self, folder: Path) -> None:
        """What `save` wrote, in place, on every rank."""
        assign(self.weights, load_file(folder / "weights.safetensors"))
        if self.average:
            assign(self.average.weights, load_file(folder / "average.safetensors"))
        if self.deepspeed:
            self.network.load_checkpoint(folder, tag="deepspeed")
            return
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        if self.sharded:
            set_optimizer_state_dict(self.network, self.optimizer.optimizer, state, options=WHOLE)
        else:
            self.optimizer.optimizer.load_state_dict(state)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(
                torch.load(folder / "scaler.pt", map_location="cpu", weights_only=True)
            )

    @torch.no_grad()
    def take_average(self) -> None:
        """Put the average in the weights' place: the end of training."""
        assert self.average
        for name, tensor in self.weights.items():
            tensor.copy_(self.average.weights[name])

    def snapshot(self) -> nn.Module:
        """The plain network as it stands now. Sharded: a copy on the CPU whose untrained weights are empty, to save what was trained."""
        if self.skeleton is None:
            return self.objective.network
        gathered = {name: gather(tensor).detach().cpu() for name, tensor in self.weights.items()}
        self.skeleton.load_state_dict(gathered, strict=False, assign=True)
        return self.skeleton


def gather(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole; collective. Others as they are."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


@torch.no_grad()
def assign(into: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy whole tensors by name, in place, each rank its shard."""
    for name, tensor in into.items():
        if isinstance(tensor, DTensor):
            value: Any = distribute_tensor(
                values[name].to(tensor.device), tensor.device_mesh, tensor.placements
            )
            tensor.copy_(value)
        elif hasattr(tensor, "ds_id"):
            from deepspeed.zero import GatheredParameters

            with GatheredParameters([tensor], modifier_rank=0):
                tensor.copy_(values[name])
        else:
            tensor.copy_(values[name])


def empty_copy(module: nn.Module) -> nn.Module:
    """The same module with parameters that hold no memory."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, memo=dict(empty))
