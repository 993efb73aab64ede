"""A network in training: its optimiser, its average, and its weights as whole tensors by name.

The tensors are whole wherever their shards lie: under FSDP2 and DeepSpeed too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
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

from deradiff.models.cuda_graphs import RecordedTraining
from deradiff.training import zero
from deradiff.training.objectives.base import Objective
from deradiff.training.optimizers import Average, make_optimizer
from deradiff.training.options import TrainingOptions

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)

WHOLE_ON_EACH_DEVICE = (DistributedType.NO, DistributedType.MULTI_GPU)
"""How accelerate wraps a network that no rank has only a part of."""


def read_tensors(file: Path) -> Any:
    """The tensors and numbers that torch.save has written; nothing else is unpickled.

    Args:
        file: of a checkpoint.

    Raises:
        ValueError: for a file that is torn, or holds anything else.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    # Besides UnpicklingError the reader fails with whatever a torn file leads it to.
    except Exception as error:
        raise ValueError(
            f"{file} is no state of an optimiser that can be read ({type(error).__name__}): remove "
            "its folder, and the same command goes on from an earlier checkpoint"
        ) from error


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

        # DeepSpeed has a config of its own, which is told of the run's options.
        self.zero = None
        if accelerator.state.deepspeed_plugin is not None:
            self.zero = zero.Zero(accelerator, options)

        # Before accelerate wraps the network: the recordings are of what it wraps.
        self._recorded = self._record_passes() if options.cuda_graphs else []

        # The optimiser gets the plain parameters; accelerate replaces them where it shards.
        parameters = [p for p in objective.network.parameters() if p.requires_grad]
        optimizer = make_optimizer(parameters, options)
        self._groups = optimizer.state_dict()["param_groups"]
        self.network, self.optimizer = accelerator.prepare(objective.network, optimizer)

        # The weights are read now: FSDP2 has put shards in their place.
        whole: nn.Module = accelerator.unwrap_model(self.network)
        self.weights: dict[str, Tensor] = {
            name: p for name, p in whole.named_parameters() if p.requires_grad
        }
        self.average = Average(self.shards, options.ema) if options.ema else None
        self.sharded = any(is_shard(tensor) for tensor in self.weights.values())
        self.skeleton = skeleton if self.sharded else None

    @property
    def shards(self) -> dict[str, Tensor]:
        """What this rank holds of the weights, by name."""
        return {name: shard_of(tensor) for name, tensor in self.weights.items()}

    def _record_passes(self) -> list[RecordedTraining]:
        """Have the network's passes recorded, and those of a frozen copy of it.

        Raises:
            ValueError: for a network whose passes cannot be recorded.
        """
        is_whole = self.accelerator.distributed_type in WHOLE_ON_EACH_DEVICE
        if self.accelerator.device.type != "cuda" or not is_whole:
            return []
        network: Any = self.objective.network
        copies = [other for other in self.objective.frozen if type(other) is type(network)]
        return [RecordedTraining(own) for own in [network, *copies]]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A forward pass, in the run's precision; of frozen networks too."""
        autocast = self.accelerator.autocast if self.zero is None else self.zero.autocast
        with ExitStack() as stack:
            stack.enter_context(autocast())
            for recorded in self._recorded:
                stack.enter_context(recorded.active())
            yield

    def step(self, max_norm: float) -> None:
        """Clip the gradient and step; in the middle of an accumulation accelerate does nothing."""
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(self.weights.values(), max_norm)
            self.norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.optimizer.step()
        # A recorded backward pass writes where it wrote before.
        self.optimizer.zero_grad(set_to_none=not self._recorded)

    def norm_value(self) -> float:
        """The norm of the last gradient; 0 where it is unknown."""
        return 0.0 if self.norm is None else float(self.norm)

    def update_average(self, step: int) -> None:
        """Take the weights into the average; step: the number of steps done."""
        if self.average is not None:
            self.average.update(self.shards, step)

    def save(self, folder: Path) -> None:
        """Write weights, average and optimiser into a folder that exists; the main process does."""
        # Weights and average, gathered one by one.
        parts = {"weights": self.shards}
        if self.average is not None:
            parts["average"] = self.average.weights
        for name, shards in parts.items():
            gathered = self._gathered(shards)
            if self.accelerator.is_main_process:
                save_file(gathered, folder / f"{name}.safetensors")

        # The optimiser, and fp16's scaler.
        state = self._optimizer_state()
        if self.accelerator.is_main_process:
            torch.save(state, folder / "optimizer.pt")
            if self.accelerator.scaler:
                torch.save(self.accelerator.scaler.state_dict(), folder / "scaler.pt")

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state of whole tensors, as a plain one's `state_dict`; collective.

        It is the main process's; the others may get nothing.
        """
        if self.zero is not None:
            state = zero.optimizer_state(self.network, self.weights)
            return {"state": state, "param_groups": self._groups}
        inner = self.optimizer.optimizer
        if self.sharded:
            by_name = get_optimizer_state_dict(self.network, inner, options=WHOLE)
            if not self.accelerator.is_main_process:
                return {}
            return renamed(by_name, {name: i for i, name in enumerate(self.weights)})
        return inner.state_dict()

    def _gathered(self, shards: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU, of the weights or of their average; collective."""
        gathered = {}
        for name, shard in shards.items():
            gathered[name] = gather(self.weights[name], shard).detach().cpu().contiguous()
        return gathered

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, in place, on every rank."""
        # Weights and average.
        weights = load_file(folder / "weights.safetensors")
        if self.zero is not None:
            zero.load_weights(self.network, self.weights, weights)
        else:
            self._assign(self.shards, weights)
        if self.average is not None:
            self._assign(self.average.weights, load_file(folder / "average.safetensors"))

        # The optimiser, and fp16's scaler.
        inner = self.optimizer.optimizer
        state = read_tensors(folder / "optimizer.pt")
        if self.zero is not None:
            zero.load_optimizer_state(self.network, self.weights, state["state"])
        elif self.sharded:
            by_name = renamed(state, dict(enumerate(self.weights)))
            set_optimizer_state_dict(self.network, inner, by_name, options=WHOLE)
        else:
            inner.load_state_dict(state)
        if self.accelerator.scaler:
            scaler = read_tensors(folder / "scaler.pt")
            self.accelerator.scaler.load_state_dict(scaler)

    @torch.no_grad()
    def _assign(self, shards: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        """Copy whole tensors into the shards of the weights, or of their average, in place."""
        for name, shard in shards.items():
            shard.copy_(part_of(self.weights[name], values[name]))

    def snapshot(self) -> nn.Module:
        """The plain network as it stands now.

        Of a sharded one a copy on the CPU, whose untrained weights are empty: enough to save what
        is trained.
        """
        if self.skeleton is None:
            return self.objective.network
        self.skeleton.load_state_dict(self._gathered(self.shards), strict=False, assign=True)
        return self.skeleton

    def finish(self) -> None:
        """End training: the average takes the weights' place, and the objective has the network."""
        for recorded in self._recorded:
            recorded.release()
        if self.average is not None:
            self._take_average(self.average)
        if self.sharded:
            self.objective.network = self.snapshot()

    @torch.no_grad()
    def _take_average(self, average: Average) -> None:
        for name, shard in self.shards.items():
            shard.copy_(average.weights[name])


def is_shard(weight: Tensor) -> bool:
    """Whether FSDP2 or ZeRO 3 has split a weight."""
    return isinstance(weight, DTensor) or zero.is_split(weight)


def shard_of(weight: Tensor) -> Tensor:
    """What this rank holds of a weight: a shard of it, or all of it."""
    return zero.own_part(weight) if zero.is_split(weight) else weight


def gather(weight: Tensor, shard: Tensor) -> Tensor:
    """A whole tensor of the ranks' shards; collective, where the weight is split.

    Args:
        weight: of which `shard` is the shard, or whose average it is.
        shard: of this rank.
    """
    if isinstance(shard, DTensor):
        return shard.full_tensor()
    if zero.is_split(weight):
        return zero.whole(weight, shard)
    return shard


def part_of(weight: Tensor, value: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, split as a weight is."""
    if isinstance(weight, DTensor):
        value = value.to(weight.device)
        return distribute_tensor(value, weight.device_mesh, weight.placements)
    if zero.is_split(weight):
        return zero.part_of(weight, value)
    return value


def renamed(state: dict[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """The state of an optimiser, its weights called otherwise.

    Args:
        state: a `state_dict`.
        names: the new name, or position, of each weight.
    """
    groups = []
    for group in state["param_groups"]:
        groups.append(group | {"params": [names[name] for name in group["params"]]})
    of_weights = {names[name]: values for name, values in state["state"].items()}
    return {"state": of_weights, "param_groups": groups}


def empty_copy(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters hold no memory (meta device)."""
    # `deepcopy` takes what the memo holds instead of copying it.
    empty = {}
    for p in module.parameters():
        empty[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    return copy.deepcopy(module, memo=dict(empty))
