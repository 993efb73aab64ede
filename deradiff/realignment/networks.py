"""The reference network and its anchors, evaluated on the same input where they are needed.

Models are numbered: 0 is the reference, i is the i-th anchor.

Shapes: rows of the denoiser's batch, (rows, ...). Some networks take and return a list with a
tensor for each row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from deradiff.realignment.adapters import Adapter, check_unfused, lora_layers
from deradiff.realignment.cache_states import (
    REFERENCE,
    CacheStates,
    Memories,
    ProcessorWatch,
    Watch,
    has_objects,
)
from deradiff.realignment.full_anchor import FullAnchor
from deradiff.realignment.merged_lora import MergedLora, mergeable
from deradiff.realignment.random_numbers import RandomNumbers
from deradiff.realignment.summed_weights import asks_for_scale

TIME_ARGUMENTS = (
    "timestep",
    "timesteps",
    "t",
    "sigma",
    "time",
    "timestep_ratio",
    "timestep_t",
)
"""What networks call the time that they are told."""

BESIDE = 1
"""The number of the reference where a sum of weights is evaluated in its place."""

NO_BATCH = "this pipeline's network cannot evaluate a LoRA anchor and its reference as one batch"
"""How a refusal of `batched` begins."""


@dataclass(frozen=True)
class Call:
    """One evaluation of the denoiser that a pipeline asks for.

    Attributes:
        forward: the reference network's own forward; it returns a tensor, a tuple, a list or an
            output of diffusers.
        args: its positional arguments.
        kwargs: its keyword arguments.
        parameters: the names of the forward's parameters, in their order.
        shared_arguments: names of keyword arguments that belong to all rows of a batch alike.
    """

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: tuple[str, ...]
    shared_arguments: tuple[str, ...] = ()

    @property
    def x(self) -> Any:
        """The noisy latents (rows, ...): the first argument."""
        if self.args:
            return self.args[0]
        return self.kwargs.get(self.parameters[0], next(iter(self.kwargs.values()), None))

    @property
    def rows(self) -> int:
        """The rows of the batch."""
        return len(self.x)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor among the arguments; the CPU where there is none."""
        leaves, _ = tree_flatten((self.x, self.args, self.kwargs))
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                return leaf.device
        return torch.device("cpu")

    @property
    def timestep(self) -> Any:
        """The time that the network is told: a number, or one for each row; None: unknown."""
        named = dict(zip(self.parameters, self.args)) | self.kwargs
        for name in TIME_ARGUMENTS:
            if isinstance(named.get(name), Tensor | float | int):
                return named[name]
        return None

    def __call__(self) -> Any:
        """The reference's output."""
        return self.forward(*self.args, **self.kwargs)

    def repeated(self, times: int) -> Call:
        """The same evaluation with every row `times` over: (times * rows, ...)."""

        def repeat(value: Any) -> Any:
            has_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == self.rows
            return torch.cat([value] * times) if has_rows else value

        kwargs = {}
        for name, value in self.kwargs.items():
            is_shared = name in self.shared_arguments
            kwargs[name] = value if is_shared else tree_map(repeat, value)
        return replace(self, args=tree_map(repeat, self.args), kwargs=kwargs)

    def cloned(self) -> Call:
        """The same evaluation on copies of the tensors."""
        args, kwargs = tree_map(_clone, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def equals(self, other: Call) -> bool:
        """Whether all arguments of both are the same, element for element."""
        ours, our_structure = tree_flatten((self.args, self.kwargs))
        theirs, their_structure = tree_flatten((other.args, other.kwargs))
        if our_structure != their_structure:
            return False
        return all(_equal(a, b) for a, b in zip(ours, theirs))


@cache
def parameters_of(network_class: type[nn.Module]) -> tuple[str, ...]:
    """The names of the parameters of a network's forward, without `self`."""
    return tuple(inspect.signature(network_class.forward).parameters)[1:]


@dataclass(frozen=True)
class Output:
    """What a network returned, as its parts.

    Attributes:
        leaves: tensors, and whatever else a network returns.
        structure: how they make up the output.
    """

    leaves: list[Any]
    structure: TreeSpec

    def copied(self) -> Output:
        """The same output in tensors of its own."""
        return Output([_clone(leaf) for leaf in self.leaves], self.structure)

    def whole(self) -> Any:
        """The output as the network returns it."""
        return tree_unflatten(self.leaves, self.structure)


@dataclass
class Cost:
    """How many rows were evaluated in a call of the pipeline, by whatever network.

    Attributes:
        rows_requested: by the pipeline.
        rows_evaluated: by the reference and the anchors, or answered from memory for them.
    """

    rows_requested: int = 0
    rows_evaluated: int = 0


_Form = tuple[int, bool]
"""A model, and whether it is evaluated as a merged LoRA."""


class Networks:
    """The reference and its anchors on one input.

    Args:
        denoiser: the reference network.
        anchors: LoRA anchors on the reference's network, or full anchors for it.
        cost: counts the rows that are evaluated.
        batched: run the rows of a LoRA anchor and of the reference as one batch.
        memory: whether LoRA anchors get weights of their own (`merged_lora.mergeable`).
        is_compiled: whether outputs differ from the stock pipeline's anyway, in rounding.
        checks_batches: compare the first joint evaluation of a chain with separate ones, for a
            network of whose arguments it is not known which have rows.
        shared_start: remember the first step of a chain, and answer from memory when it is asked
            for again, as every lambda of a sweep from the same noise does. What the arguments do
            not show, such as the scale of an IP-Adapter, must not change meanwhile.

    Raises:
        ValueError: for `batched` with anchors whose rows cannot run in the reference's batch.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        anchors: Sequence[Adapter | FullAnchor],
        cost: Cost,
        *,
        batched: bool,
        memory: str,
        is_compiled: bool,
        checks_batches: bool,
        shared_start: bool,
    ) -> None:
        self.denoiser = denoiser
        self.anchors = anchors
        self.batched = batched
        self.memory = memory
        self.is_compiled = is_compiled
        self.checks_batches = checks_batches
        self.shared_start = shared_start
        self.cost = cost
        self.caches = CacheStates(denoiser)
        self._memories = Memories()
        # The LoRA anchors with weights of their own, by model.
        self._merged: dict[int, MergedLora] = {}
        # The first evaluation of a chain, and its outputs.
        self._first: tuple[Call, dict[_Form, Output]] | None = None
        self._is_batch_checked = not checks_batches
        # Whether the attention processors were seen to keep nothing of an evaluation.
        self._are_processors_checked = False
        if batched:
            self._check_batchable()

    def _check_batchable(self) -> None:
        adapters = [anchor for anchor in self.anchors if isinstance(anchor, Adapter)]
        if not adapters:
            raise ValueError(
                "batched=True evaluates a LoRA anchor and its reference as one batch, and a full "
                "anchor is another network: remove batched=True"
            )
        for adapter in adapters:
            adapter.check_batchable()

    @property
    def has_active_adapter(self) -> bool:
        """Whether a LoRA anchor acts beside the network now."""
        adapters = [anchor for anchor in self.anchors if isinstance(anchor, Adapter)]
        return any(adapter.is_active for adapter in adapters)

    def begin_chain(self) -> None:
        """Look at the network anew, and forget what its models remember of another chain.

        Raises:
            ValueError: for a network that has been changed in a way that cannot be realigned.
        """
        self.caches.refresh()
        self._memories.forget()
        check_unfused(lora_layers(self.denoiser))
        self._choose_merged()
        self._is_batch_checked = not self.checks_batches
        if self.caches.has_caches and (self.batched or self.shared_start):
            option = "batched=True" if self.batched else "shared_start=True"
            raise ValueError(
                f"{option} and a cache of diffusers on the network do not go together: switch off "
                "one of them (disable_cache)"
            )
        self._are_processors_checked = False
        for anchor in self.anchors:
            if isinstance(anchor, FullAnchor):
                anchor.refresh()

    def _choose_merged(self) -> None:
        """Decide which LoRA anchors get weights of their own in this chain."""
        adapters: dict[int, Adapter] = {}
        for number, anchor in enumerate(self.anchors, start=1):
            if isinstance(anchor, Adapter):
                adapters[number] = anchor
        chosen = [] if self.batched else mergeable(list(adapters.values()), self.memory)
        merged = {}
        for number, adapter in adapters.items():
            if adapter in chosen:
                merged[number] = self._merged.get(number) or MergedLora(adapter)
                merged[number].forget()
        self._merged = merged

    def evaluate(
        self,
        call: Call,
        wanted: Sequence[bool],
        is_first_evaluation: bool = False,
        as_stock: bool = False,
    ) -> list[Output | None]:
        """Evaluate some of the models on the same input.

        Args:
            call: the evaluation that the pipeline asks for.
            wanted: whether the output of the reference, and of each anchor, is needed.
            is_first_evaluation: whether this is the first evaluation of a chain.
            as_stock: whether an anchor's output has to be the stock pipeline's, bit for bit, so
                that a LoRA is not merged. Compiled networks do not ask for it.

        Returns:
            An output for each of `wanted`; None where it is not wanted.
        """
        for number, anchor in enumerate(self.anchors, start=1):
            is_wanted = number < len(wanted) and wanted[number]
            if is_wanted or isinstance(anchor, Adapter):
                anchor.follow()
        is_apart = (as_stock and not self.is_compiled) or asks_for_scale(call.kwargs)
        merged = {} if is_apart else self._merged

        # What is evaluated now is remembered, too: `known` may be the memory itself.
        is_shared = is_first_evaluation and self.shared_start
        is_shared = is_shared and not has_objects((call.args, call.kwargs))
        known = self._remembered(call) if is_shared else {}
        models = [model for model, is_wanted in enumerate(wanted) if is_wanted]
        missing = [model for model in models if (model, model in merged) not in known]
        for model, output in self._evaluate(call, missing, merged).items():
            known[model, model in merged] = output
        # An object of keys and values is the chain's own: it is not given to the next one.
        if is_shared and any(has_objects(output.leaves) for output in known.values()):
            self._first = None
        # What the memory answers counts, too: what a chain costs does not depend on others.
        self.cost.rows_evaluated += len(models) * call.rows

        outputs: list[Output | None] = [None] * len(wanted)
        for model in models:
            output = known[model, model in merged]
            # The pipeline may write into what it gets.
            outputs[model] = output.copied() if is_shared else output
        return outputs

    def evaluate_sum(
        self, call: Call, summed: Callable[[Call], Any], with_reference: bool
    ) -> tuple[Output, Output | None]:
        """Evaluate the network with other weights, and the reference beside it.

        Args:
            call: the evaluation that the pipeline asks for.
            summed: the output with the other weights.
            with_reference: whether the reference is evaluated, too.

        Returns:
            Both outputs; None for the reference where it is not evaluated.
        """
        for anchor in self.anchors:
            if isinstance(anchor, Adapter):
                anchor.follow()
        # What the pipeline remembers is the sum's, and the reference beside it has a memory of its
        # own.
        evaluators = {REFERENCE: summed, BESIDE: Call.__call__}
        models = [REFERENCE, BESIDE] if with_reference else [REFERENCE]
        outputs = self._evaluate_apart(call, models, evaluators)
        self.cost.rows_evaluated += len(models) * call.rows
        return outputs[REFERENCE], outputs.get(BESIDE)

    def _evaluators(self, merged: Mapping[int, MergedLora]) -> dict[int, Callable[[Call], Any]]:
        """What evaluates each model.

        Args:
            merged: LoRA anchors that are evaluated with weights of their own.
        """
        evaluators: dict[int, Callable[[Call], Any]] = {REFERENCE: Call.__call__}
        for number, anchor in enumerate(self.anchors, start=1):
            evaluators[number] = (merged.get(number) or anchor).output
        return evaluators

    def _remembered(self, call: Call) -> dict[_Form, Output]:
        """The outputs of a chain's first step; empty for another one than last time."""
        if self._first is None or not self._first[0].equals(call):
            self._first = (call.cloned(), {})
        return self._first[1]

    def _evaluate(
        self, call: Call, models: Sequence[int], merged: Mapping[int, MergedLora]
    ) -> dict[int, Output]:
        """Evaluate the models, as one batch where that is asked for.

        Args:
            call: the evaluation that the pipeline asks for.
            models: the models.
            merged: LoRA anchors that are evaluated with weights of their own.
        """
        evaluators = self._evaluators(merged)
        watch = self._processor_watch(len(models)) if self.batched else None
        joint = self._evaluate_jointly(call, models) if self.batched else {}
        if joint and watch:
            watch.check()
            self._are_processors_checked = True
        if joint and not self._is_batch_checked:
            _check_batch(joint, self._evaluate_apart(call, list(joint), evaluators))
            self._is_batch_checked = True
        rest = [model for model in models if model not in joint]
        return joint | self._evaluate_apart(call, rest, evaluators)

    def _evaluate_apart(
        self,
        call: Call,
        models: Sequence[int],
        evaluators: Mapping[int, Callable[[Call], Any]],
    ) -> dict[int, Output]:
        """Evaluate the models one after the other.

        Args:
            call: the evaluation that the pipeline asks for.
            models: the models.
            evaluators: what evaluates each, also those that are not evaluated now.
        """
        if not models:
            return {}
        # Each gets lists, dictionaries and memories of its own before any of them runs.
        arguments = (call.args, call.kwargs)
        calls = {}
        for model in models:
            args, kwargs = self._memories.arguments(model, arguments)
            calls[model] = replace(call, args=args, kwargs=kwargs)
        first = calls[models[0]]
        watch = Watch((first.args, first.kwargs))

        outputs = {}
        random_numbers = RandomNumbers(call.device)
        processors = None
        for model, own_call in calls.items():
            # By the last model, what is made once is there.
            if model == models[-1]:
                processors = self._processor_watch(len(models))
            with self.caches.of(model), random_numbers.repeated():
                output = evaluators[model](own_call)
            outputs[model] = Output(*tree_flatten(output))
        if processors:
            processors.check()
            self._are_processors_checked = True
        others = evaluators.keys() - outputs.keys()
        leaves = {model: output.leaves for model, output in outputs.items()}
        self._memories.note_evaluation(arguments, watch, leaves, others)
        return outputs

    def _processor_watch(self, models: int) -> ProcessorWatch | None:
        """A watch of the attention processors, once a chain, where they would serve several models.

        Args:
            models: that are evaluated at this step.
        """
        if self._are_processors_checked or (models < 2 and not self.shared_start):
            return None
        return ProcessorWatch(self.denoiser)

    def _evaluate_jointly(self, call: Call, models: Sequence[int]) -> dict[int, Output]:
        """Evaluate the models on the reference's network as one batch, where there are several."""
        adapters: dict[int, Adapter] = {}
        for number, anchor in enumerate(self.anchors, start=1):
            if isinstance(anchor, Adapter):
                adapters[number] = anchor
        joint = [model for model in models if model == REFERENCE or model in adapters]
        if len(joint) < 2:
            return {}
        if not isinstance(call.x, Tensor):
            raise ValueError(f"{NO_BATCH}: it takes a list of rows; remove batched=True")

        # Each adapter acts on its own part of the batch, and the reference's part has none.
        with ExitStack() as stack:
            for position, model in enumerate(joint):
                if model == REFERENCE:
                    continue
                scales = torch.zeros(len(joint), call.rows, device=call.x.device)
                scales[position] = 1
                stack.enter_context(adapters[model].active(scales.flatten()))
            try:
                output = call.repeated(len(joint))()
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = str(error).strip().partition("\n")[0]
                raise ValueError(f"{NO_BATCH} ({reason}): remove batched=True") from error
        leaves, structure = tree_flatten(output)
        return _split(leaves, structure, joint, call.rows)


def _check_batch(joint: dict[int, Output], apart: dict[int, Output]) -> None:
    """Raise ValueError where models evaluated as one batch are not what they are apart.

    Args:
        joint: the output of each model out of one batch.
        apart: the output of each model on its own.
    """
    first = apart[min(apart)]
    for model, output in apart.items():
        for own, leaf, other in zip(joint[model].leaves, output.leaves, first.leaves):
            if not isinstance(leaf, Tensor):
                continue
            # The order of sums differs between batches; the models differ by far more.
            scale = (leaf.float() - other.float()).abs().max() + 1e-3 * leaf.float().abs().max()
            is_same = own.shape == leaf.shape and (own - leaf).abs().max() <= 0.05 * scale
            if not bool(is_same):
                raise ValueError(
                    f"{NO_BATCH}, because its rows do not stay apart: remove batched=True"
                )


def _split(
    leaves: Sequence[Any], structure: TreeSpec, models: Sequence[int], rows: int
) -> dict[int, Output]:
    """The output of each model out of one batch of all."""
    parts: dict[int, list[Any]] = {model: [] for model in models}
    for leaf in leaves:
        has_rows = isinstance(leaf, Tensor) and len(leaf) == len(models) * rows
        chunks = leaf.chunk(len(models)) if has_rows else [leaf] * len(models)
        for model, chunk in zip(models, chunks):
            parts[model].append(chunk)
    return {model: Output(own, structure) for model, own in parts.items()}


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and a == b
