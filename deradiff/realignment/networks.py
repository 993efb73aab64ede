"""The reference network and its anchors, evaluated on the same input where they are needed.

Models are numbered: 0 is the reference, i is the i-th anchor.

Shapes: rows of the denoiser's batch, (rows, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from deradiff.anchors.anchor import Anchor
from deradiff.realignment.adapters import Adapter, lora_layers

REFERENCE = 0
"""The number of the reference among the models."""


@dataclass(frozen=True)
class Call:
    """One evaluation of the denoiser that a pipeline asks for.

    Attributes:
        forward: the reference network's own forward; it returns a tuple or an output of diffusers.
        args: its positional arguments.
        kwargs: its keyword arguments.
        shared_arguments: names of keyword arguments that belong to all rows of a batch alike.
    """

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shared_arguments: tuple[str, ...] = ()

    @property
    def x(self) -> Any:
        """The noisy latents (rows, ...)."""
        if self.args:
            return self.args[0]
        return self.kwargs.get("sample", self.kwargs.get("hidden_states"))

    @property
    def timestep(self) -> Tensor | float:
        """The time that the network gets: a number, or one for each row."""
        return self.args[1] if len(self.args) > 1 else self.kwargs["timestep"]

    def __call__(self) -> Any:
        """The reference's output."""
        return self.forward(*self.args, **self.kwargs)

    def repeated(self, times: int) -> Call:
        """The same evaluation with every row `times` over: (times * rows, ...)."""
        rows = len(self.x)

        def repeat(value: Any) -> Any:
            has_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
            return torch.cat([value] * times) if has_rows else value

        kwargs = {}
        for name, value in self.kwargs.items():
            is_shared = name in self.shared_arguments
            kwargs[name] = value if is_shared else tree_map(repeat, value)
        return Call(self.forward, tree_map(repeat, self.args), kwargs, self.shared_arguments)

    def cloned(self) -> Call:
        """The same evaluation on copies of the tensors."""
        args, kwargs = tree_map(_clone, (self.args, self.kwargs))
        return Call(self.forward, args, kwargs, self.shared_arguments)

    def equals(self, other: Call) -> bool:
        """Whether all arguments of both are the same, element for element."""
        ours, our_structure = tree_flatten((self.args, self.kwargs))
        theirs, their_structure = tree_flatten((other.args, other.kwargs))
        if our_structure != their_structure:
            return False
        return all(_equal(a, b) for a, b in zip(ours, theirs))


class FullAnchor:
    """A full anchor: a second network beside the reference.

    It is not a submodule of the reference, so that nothing moves, saves or counts it along with the
    reference. It moves to the device and precision of its input instead.

    Args:
        denoiser: the reference network.
        anchor: the full anchor.
        family: the pipeline's family, for errors.

    Raises:
        ValueError: for weights of another architecture than the reference's.
    """

    def __init__(self, denoiser: Any, anchor: Anchor, family: str) -> None:
        self.denoiser = denoiser
        self.anchor = anchor
        self._network: Any = None
        # Asking the network for its device and precision at every step would be slow.
        self._placement: tuple[torch.device, torch.dtype] | None = None

        # Weights that are offloaded layer by layer are on the device "meta".
        is_offloaded = denoiser.device.type == "meta"
        device = torch.device("cpu") if is_offloaded else denoiser.device
        self._check_shapes(self.network(device, denoiser.dtype), family)

    def network(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The anchor's network, on a device and in a precision."""
        if self._placement != (device, dtype):
            self._network = self.anchor.network(self.denoiser, device, dtype)
            self._placement = (device, dtype)
            _compile_like(self.denoiser, self._network)
        return self._network

    def output(self, call: Call) -> Any:
        """The anchor's output for the arguments that the reference got."""
        return self.network(call.x.device, call.x.dtype)(*call.args, **call.kwargs)

    def _check_shapes(self, network: nn.Module, family: str) -> None:
        ours = base_parameters(self.denoiser)
        theirs = dict(network.named_parameters())
        for name in sorted(ours.keys() | theirs.keys()):
            our_shape = _shape_of(ours, name)
            their_shape = _shape_of(theirs, name)
            if our_shape != their_shape:
                raise ValueError(
                    f"the anchor {self.anchor.source} does not fit the {family} pipeline: {name} "
                    f"is {their_shape} in the anchor and {our_shape} in the pipeline; give an "
                    "anchor of its family"
                )


class Networks:
    """The reference and its anchors on one input.

    Args:
        anchors: LoRA anchors on the reference's network, or full anchors beside it.
        batched: run the rows of a LoRA anchor and of the reference as one batch.
        shared_start: remember the first step of a chain, and answer from memory when it is asked
            for again, as every lambda of a sweep from the same noise does. What the arguments do
            not show, such as the scale of an IP-Adapter, must not change meanwhile.

    Attributes:
        rows_evaluated: rows that any network has evaluated; whoever counts sets it back.

    Raises:
        ValueError: for `batched` with anchors whose rows cannot run in the reference's batch.
    """

    def __init__(
        self, anchors: Sequence[Adapter | FullAnchor], batched: bool, shared_start: bool
    ) -> None:
        self.anchors = anchors
        self.batched = batched
        self.shared_start = shared_start
        self.rows_evaluated = 0
        self._first: tuple[Call, dict[int, Any]] | None = None
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

    def evaluate(
        self, call: Call, wanted: Sequence[bool], is_first_evaluation: bool = False
    ) -> list[Any]:
        """Evaluate some of the models on the same input.

        Args:
            call: the evaluation that the pipeline asks for.
            wanted: whether the output of the reference, and of each anchor, is needed.
            is_first_evaluation: whether this is the first evaluation of a chain.

        Returns:
            An output for each of `wanted`; None where it is not wanted.
        """
        outputs: dict[int, Any] = {}
        if is_first_evaluation and self.shared_start:
            outputs = self._remembered(call)

        # What is evaluated now is remembered, too: `outputs` may be the memory itself.
        models = [model for model, is_wanted in enumerate(wanted) if is_wanted]
        missing = [model for model in models if model not in outputs]
        outputs.update(self._evaluate(call, missing))
        self.rows_evaluated += len(missing) * len(call.x)
        return [outputs[i] if is_wanted else None for i, is_wanted in enumerate(wanted)]

    def _remembered(self, call: Call) -> dict[int, Any]:
        """The outputs by model of a chain's first step; empty for another one than last time."""
        if self._first is None or not self._first[0].equals(call):
            self._first = (call.cloned(), {})
        return self._first[1]

    def _evaluate(self, call: Call, models: Sequence[int]) -> dict[int, Any]:
        outputs = self._evaluate_jointly(call, models) if self.batched else {}
        for model in models:
            if model in outputs:
                continue
            if model == REFERENCE:
                outputs[model] = call()
            else:
                outputs[model] = self.anchors[model - 1].output(call)
        return outputs

    def _evaluate_jointly(self, call: Call, models: Sequence[int]) -> dict[int, Any]:
        """Evaluate the models on the reference's network as one batch, where there are several."""
        adapters: dict[int, Adapter] = {}
        for number, anchor in enumerate(self.anchors, start=1):
            if isinstance(anchor, Adapter):
                adapters[number] = anchor
        joint = [model for model in models if model == REFERENCE or model in adapters]
        if len(joint) < 2:
            return {}

        # Each adapter acts on its own part of the batch, and the reference's part has none.
        with ExitStack() as stack:
            for position, model in enumerate(joint):
                if model == REFERENCE:
                    continue
                scales = torch.zeros(len(joint), len(call.x), device=call.x.device)
                scales[position] = 1
                stack.enter_context(adapters[model].active(scales.flatten()))
            output = call.repeated(len(joint))()
        parts = output[0].chunk(len(joint))
        return {model: with_tensor(output, part) for model, part in zip(joint, parts)}


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """A network's output, a tuple or an output of diffusers, with another tensor in it."""
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    return type(output)(sample=tensor)


def base_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """A network's own parameters by the names that they have without any LoRA on it."""
    parameters = {}
    for name, parameter in denoiser.named_parameters():
        if ".lora_" not in name:
            parameters[name.replace(".base_layer.", ".")] = parameter
    return parameters


def check_own_loras(denoiser: nn.Module) -> None:
    """Check that no LoRA of the user's acts on the reference network.

    A full anchor beside the reference does not have that LoRA.

    Raises:
        ValueError: where there is an active one.
    """
    for layer in lora_layers(denoiser).values():
        if layer.disable_adapters or not layer.active_adapters:
            continue
        raise ValueError(
            f"the pipeline's own LoRA ({layer.active_adapters[0]}) is on the reference alone, not "
            "on a full anchor: call pipe.unload_lora_weights() or pipe.disable_lora() first, or "
            "use mode='weights'"
        )


def _compile_like(denoiser: Any, network: Any) -> None:
    """Compile the anchor's network where the pipeline's is, whole or block by block."""
    if denoiser._compiled_call_impl:
        if not network._compiled_call_impl:
            network.compile()
    elif _has_compiled_block(denoiser) and not _has_compiled_block(network):
        network.compile_repeated_blocks()


def _has_compiled_block(network: nn.Module) -> bool:
    blocks = list(network.modules())[1:]
    return any(block._compiled_call_impl for block in blocks)


def _shape_of(parameters: dict[str, nn.Parameter], name: str) -> tuple[int, ...] | str:
    return tuple(parameters[name].shape) if name in parameters else "missing"


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and a == b
