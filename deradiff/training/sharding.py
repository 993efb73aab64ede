"""A network in training: its optimiser, its average, and its weights as whole tensors by name.

The tensors are whole wherever their shards lie: under FSDP2 and DeepSpeed too.
"""

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

from deradiff.training.objectives.base import Objective
from deradiff.training.optimizers import Average, make_optimizer
from deradiff.training.options import TrainingOptions

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class TrainedNetwork:
    """The objective's network and its optimiser, as accelerate wrapped them.

    The network is plain, or wrapped by DDP, FSDP2 or DeepSpeed. `save`, `load`, `snapshot` and
    `finish` are collective: where the network is sharded, every rank has to call them.

    Args:
        objective: its network is wrapped.
        options: of the run.
        accelerator: of the run.

    Attributes:
        network: the wrapped network, which the loss takes.
        optimizer: the wrapped optimiser.
        weights: the trained weights by name; shards, where the network is sharded.
        average: their moving average; None: there is none.
        norm: of the last gradient, before it was clipped; None: unknown.
    """

    def __init__(
        self, objective: Objective, options: TrainingOptions, accelerator: Accelerator
    ) -> None:
        self.objective = objective
        self.accelerator = accelerator
        self.norm: Tensor | float | None = torch.tensor(0.0)
        # Copied now: once the network is sharded, a plain copy of it cannot be made.
        skeleton = empty_copy(objective.network)

        # DeepSpeed asks for what it would have read off a data loader of accelerate's.
        plugin = accelerator.state.deepspeed_plugin
        if plugin is not None:
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = options.batch_size

        # The optimiser gets the plain parameters; accelerate replaces them where it shards.
        parameters = [p for p in objective.network.parameters() if p.requires_grad]
        optimizer = make_optimizer(parameters, options)
        self.network, self.optimizer = accelerator.prepare(objective.network, optimizer)

        # The weights are read now: FSDP2 has put shards in their place.
        whole: nn.Module = accelerator.unwrap_model(self.network)
        self.weights: dict[str, Tensor] = {
            name: p for name, p in whole.named_parameters() if p.requires_grad
        }
        self.average = Average(self.weights, options.ema) if options.ema else None
        self.sharded = any(_is_shard(tensor) for tensor in self.weights.values())
        self.skeleton = skeleton if self.sharded else None
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED

    def step(self, max_norm: float) -> None:
        """Clip the gradient and step; in the middle of an accumulation accelerate does nothing."""
        if self.accelerator.sync_gradients:
            self.norm = self.accelerator.clip_grad_norm_(self.weights.values(), max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def norm_value(self) -> float:
        """The norm of the last gradient; 0 where it is unknown."""
        return 0.0 if self.norm is None else float(self.norm)

    def update_average(self, step: int) -> None:
        """Take the weights into the average; step: the number of steps done."""
        if self.average is not None:
            self.average.update(self.weights, step)

    def save(self, folder: Path) -> None:
        """Write weights, average and optimiser into a folder that exists.

        The main process writes; DeepSpeed writes its own state on every rank.
        """
        # Weights and average, gathered one by one.
        parts = {"weights": self.weights}
        if self.average is not None:
            parts["average"] = self.average.weights
        for name, tensors in parts.items():
            gathered = {key: gather(tensor) for key, tensor in tensors.items()}
            if self.accelerator.is_main_process:
                on_cpu = {key: t.detach().cpu().contiguous() for key, t in gathered.items()}
                save_file(on_cpu, folder / f"{name}.safetensors")

        # The optimiser, and fp16's scaler.
        if self.deepspeed:
            self.network.save_checkpoint(folder, tag="deepspeed")
            return
        inner = self.optimizer.optimizer
        if self.sharded:
            state = get_optimizer_state_dict(self.network, inner, options=WHOLE)
        else:
            state = inner.state_dict()
        if self.accelerator.is_main_process:
            torch.save(state, folder / "optimizer.pt")
            if self.accelerator.scaler:
                torch.save(self.accelerator.scaler.state_dict(), folder / "scaler.pt")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, in place, on every rank."""
        # Weights and average.
        assign(self.weights, load_file(folder / "weights.safetensors"))
        if self.average is not None:
            assign(self.average.weights, load_file(folder / "average.safetensors"))

        # The optimiser, and fp16's scaler. DeepSpeed reads its own state on every rank.
        if self.deepspeed:
            self.network.load_checkpoint(folder, tag="deepspeed")
            return
        inner = self.optimizer.optimizer
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        if self.sharded:
            set_optimizer_state_dict(self.network, inner, state, options=WHOLE)
        else:
            inner.load_state_dict(state)
        if self.accelerator.scaler:
            scaler = torch.load(folder / "scaler.pt", map_location="cpu", weights_only=True)
            self.accelerator.scaler.load_state_dict(scaler)

    def snapshot(self) -> nn.Module:
        """The plain network as it stands now.

        Of a sharded one a copy on the CPU, whose untrained weights are empty: enough to save what
        is trained.
        """
        if self.skeleton is None:
            return self.objective.network
        gathered = {name: gather(tensor).detach().cpu() for name, tensor in self.weights.items()}
        self.skeleton.load_state_dict(gathered, strict=False, assign=True)
        return self.skeleton

    def finish(self) -> None:
        """End training: the average takes the weights' place, and the objective has the network."""
        if self.average is not None:
            self._take_average(self.average)
        if self.sharded:
            self.objective.network = self.snapshot()

    @torch.no_grad()
    def _take_average(self, average: Average) -> None:
        for name, tensor in self.weights.items():
            tensor.copy_(average.weights[name])


def _is_shard(tensor: Tensor) -> bool:
    """Whether FSDP2 (DTensor) or DeepSpeed ZeRO 3 (ds_id) has split a tensor."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def gather(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole; collective. Other tensors are returned as they are."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):
        # An optional package, which is there where a tensor is DeepSpeed's.
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


@torch.no_grad()
def assign(into: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy whole tensors in place, by name; each rank takes its shard.

    Args:
        into: tensors or shards.
        values: whole tensors, with at least the same names.
    """
    for name, tensor in into.items():
        value: Any = values[name]
        # FSDP2: this rank's part of the value. ZeRO 3: rank 0 writes the whole tensor.
        if isinstance(tensor, DTensor):
            value = value.to(tensor.device)
            tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements))
        elif hasattr(tensor, "ds_id"):
            # An optional package, which is there where a tensor is DeepSpeed's.
            from deepspeed.zero import GatheredParameters

            with GatheredParameters([tensor], modifier_rank=0):
                tensor.copy_(value)
        else:
            tensor.copy_(value)


def empty_copy(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters hold no memory (meta device)."""
    # `deepcopy` takes what the memo holds instead of copying it.
    empty = {}
    for p in module.parameters():
        empty[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    return copy.deepcopy(module, memo=dict(empty))
