"""Reference and anchors as networks that get the same input: evaluated where wanted, and counted.

Models are numbered: 0 is the reference, i the i-th anchor.
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
from deradiff.models.families import FAMILIES
from deradiff.realignment.adapters import Adapter, lora_layers

REFERENCE = 0


def _shared_arguments() -> frozenset[str]:
    names: set[str] = set()
    for family in FAMILIES.values():
        names.update(family.shared_arguments)
    return frozenset(names)


SHARED_ARGUMENTS = _shared_arguments()
"""Arguments of a denoiser that belong to all rows of a batch alike."""


@dataclass(frozen=True)
class Call:
    """One evaluation that a pipeline asks for. Calling it returns a tuple or a diffusers output.

    Attributes:
        forward: the reference network's own forward.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def x(self) -> Any:
        """The noisy latents (rows, ...)."""
        if self.args:
            return self.args[0]
        return self.kwargs.get("sample", self.kwargs.get("hidden_states"))

    @property
    def timestep(self) -> Tensor | float:
        """The time, as the network gets it."""
        return self.args[1] if len(self.args) > 1 else self.kwargs["timestep"]

    def __call__(self) -> Any:
        return self.forward(*self.args, **self.kwargs)

    def repeated(self, times: int) -> Call:
        """The same evaluation several times, as rows of one batch."""
        rows = len(self.x)

        def repeat(value: Any) -> Any:
            has_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
            return torch.cat([value] * times) if has_rows else value

        kwargs = {}
        for name, value in self.kwargs.items():
            kwargs[name] = value if name in SHARED_ARGUMENTS else tree_map(repeat, value)
        return Call(self.forward, tree_map(repeat, self.args), kwargs)

    def copied(self) -> Call:
        """The same evaluation on copies of its tensors."""

        def copy(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else value

        args, kwargs = tree_map(copy, (self.args, self.kwargs))
        return Call(self.forward, args, kwargs)

    def equals(self, other: Call) -> bool:
        """Whether both have the same arguments, element for element."""
        ours, our_structure = tree_flatten((self.args, self.kwargs))
        theirs, their_structure = tree_flatten((other.args, other.kwargs))
        if our_structure != their_structure:
            return False
        return all(_equal(one, two) for one, two in zip(ours, theirs, strict=True))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        is_alike = one.dtype == other.dtype and one.device == other.device
        return is_alike and torch.equal(one, other)
    return type(one) is type(other) and one == other


class FullAnchor:
    """A second network beside the reference's.

    It is no submodule of the pipeline, so nobody moves, saves or counts it. It follows its input to
    a device and a precision instead.

    Args:
        denoiser: the reference network.
        anchor: the anchor's files.
        family: the family's name, for messages.

    Raises:
        ValueError: for weights that are not those of the reference's architecture.
    """

    def __init__(self, denoiser: Any, anchor: Anchor, family: str) -> None:
        self.denoiser = denoiser
        self.anchor = anchor
        self._network: Any = None
        # The network's device and precision: reading them from it at every step is slow
        self._placement: tuple[torch.device, torch.dtype] | None = None
        self._check_fits(family)

    def _check_fits(self, family: str) -> None:
        # A reference on the meta device is offloaded layer by layer
        device = self.denoiser.device
        if device.type == "meta":
            device = torch.device("cpu")
        ours = base_parameters(self.denoiser)
        theirs = dict(self.network(device, self.denoiser.dtype).named_parameters())
        for name in sorted(ours.keys() | theirs.keys()):
            our_shape = tuple(ours[name].shape) if name in ours else "missing"
            their_shape = tuple(theirs[name].shape) if name in theirs else "missing"
            if our_shape != their_shape:
                raise ValueError(
                    f"the anchor {self.anchor.source} does not fit the {family} pipeline: {name} "
                    f"is {their_shape} in the anchor and {our_shape} in the pipeline; give an "
                    "anchor of its family"
                )

    def network(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The anchor's network on a device, in a precision, compiled where the reference is."""
        if self._placement != (device, dtype):
            self._network = self.anchor.network(self.denoiser, device, dtype)
            self._placement = (device, dtype)
            _compile_like(self.denoiser, self._network)
        return self._network

    def output(self, call: Call) -> Any:
        """The anchor's output for the reference's arguments, on their device and precision."""
        return self.network(call.x.device, call.x.dtype)(*call.args, **call.kwargs)


class Networks:
    """Reference and anchors on one input.

    Args:
        anchors: LoRA adapters and full networks.
        batched: evaluate LoRA anchors and the reference as rows of one batch.
        shared_start: keep a chain's first evaluation, and answer from memory when the same is asked
            again, as for every lambda of a sweep from the same noise. What the arguments do not
            show, such as the scale of an IP-Adapter, must not change in between.

    Attributes:
        evaluated: rows that were evaluated since it was last set to 0.

    Raises:
        ValueError: where no anchor can be batched.
    """

    def __init__(
        self, anchors: Sequence[Adapter | FullAnchor], batched: bool, shared_start: bool
    ) -> None:
        self.anchors = anchors
        self.batched = batched
        self.shared_start = shared_start
        self.evaluated = 0
        self._first_call: Call | None = None
        self._first_outputs: dict[int, Any] = {}
        if not batched:
            return
        adapters = [anchor for anchor in anchors if isinstance(anchor, Adapter)]
        if not adapters:
            raise ValueError(
                "batched=True evaluates a LoRA anchor and its reference as one batch, and a full "
                "anchor is another network"
            )
        for adapter in adapters:
            adapter.check_rows()

    def __call__(
        self, call: Call, wanted: Sequence[bool], is_first_evaluation: bool = False
    ) -> list[Any]:
        """Evaluate the networks that are wanted.

        Args:
            call: the evaluation that the pipeline asks for.
            wanted: for the reference, and for each anchor, whether its output is wanted.
            is_first_evaluation: whether a sampling run begins with this evaluation.

        Returns:
            The output of each model; None for what is not wanted.
        """
        remembers = is_first_evaluation and self.shared_start
        outputs = self._remembered(call) if remembers else {}
        missing = [model for model, want in enumerate(wanted) if want and model not in outputs]
        outputs.update(self._evaluate(call, missing))
        self.evaluated += len(missing) * len(call.x)
        return [outputs[model] if want else None for model, want in enumerate(wanted)]

    def _remembered(self, call: Call) -> dict[int, Any]:
        """The outputs known for this first evaluation of a chain; none where it is another one."""
        if self._first_call is None or not self._first_call.equals(call):
            self._first_call = call.copied()
            self._first_outputs = {}
        return self._first_outputs

    def _evaluate(self, call: Call, models: Sequence[int]) -> dict[int, Any]:
        outputs = self._evaluate_as_one_batch(call, models) if self.batched else {}
        for model in models:
            if model in outputs:
                continue
            if model == REFERENCE:
                outputs[model] = call()
            else:
                outputs[model] = self.anchors[model - 1].output(call)
        return outputs

    def _evaluate_as_one_batch(self, call: Call, models: Sequence[int]) -> dict[int, Any]:
        """The reference and the LoRA anchors among the models; nothing where there is only one."""
        together = [
            model
            for model in models
            if model == REFERENCE or isinstance(self.anchors[model - 1], Adapter)
        ]
        if len(together) < 2:
            return {}
        rows = len(call.x)
        with ExitStack() as stack:
            for place, model in enumerate(together):
                if model == REFERENCE:
                    continue
                # This anchor's adapter acts on its own rows, and on no other's
                scales = torch.zeros(len(together), rows, device=call.x.device)
                scales[place] = 1
                adapter: Any = self.anchors[model - 1]
                stack.enter_context(adapter.on(scales.flatten()))
            output = call.repeated(len(together))()
        chunks = output[0].chunk(len(together))
        return {
            model: with_tensor(output, chunk) for model, chunk in zip(together, chunks, strict=True)
        }


def _compile_like(denoiser: Any, network: Any) -> None:
    """Compile the anchor's network where the pipeline's is: as a whole, or block by block."""
    if denoiser._compiled_call_impl:
        if not network._compiled_call_impl:
            network.compile()
    elif _has_compiled_blocks(denoiser) and not _has_compiled_blocks(network):
        network.compile_repeated_blocks()


def _has_compiled_blocks(network: nn.Module) -> bool:
    blocks = list(network.modules())[1:]
    return any(block._compiled_call_impl for block in blocks)


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """A network's output of the same kind, tuple or diffusers output, around another tensor."""
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    return type(output)(sample=tensor)


def base_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """A network's own parameters, by the names that they have without any LoRA on it."""
    own = {}
    for name, parameter in denoiser.named_parameters():
        if ".lora_" not in name:
            own[name.replace(".base_layer.", ".")] = parameter
    return own


def check_own_loras(denoiser: nn.Module) -> None:
    """Raises ValueError where a LoRA of the user's acts on the reference alone.

    A full anchor beside it would not have that LoRA.
    """
    active: list[str] = []
    for layer in lora_layers(denoiser):
        if not layer.disable_adapters:
            active += layer.active_adapters
    if active:
        raise ValueError(
            f"the pipeline's own LoRA ({active[0]}) is on the reference alone, not on a full "
            "anchor: call pipe.unload_lora_weights() or pipe.disable_lora() first, or use "
            "mode='weights'"
        )
