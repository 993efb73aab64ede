"""The reference and its anchors as networks that are asked the same question: each evaluated where it is wanted, and counted."""

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

NOT_ROWS = ("img_ids", "txt_ids")  # arguments of FLUX that all rows share


@dataclass(frozen=True)
class Call:
    """One evaluation that a pipeline asks for: the reference network's own forward, and the arguments. It returns a tuple or an output."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def x(self) -> Any:
        """(rows, ...), the noisy latents."""
        return (
            self.args[0]
            if self.args
            else self.kwargs.get("sample", self.kwargs.get("hidden_states"))
        )

    @property
    def timestep(self) -> Tensor | float:
        return self.args[1] if len(self.args) > 1 else self.kwargs["timestep"]

    def __call__(self) -> Any:
        return self.forward(*self.args, **self.kwargs)

    def repeated(self, times: int) -> Call:
        """The same question `times` over, as rows of one batch."""
        rows = len(self.x)

        def repeat(value: Any) -> Any:
            whole = not isinstance(value, Tensor) or value.ndim == 0 or len(value) != rows
            return value if whole else torch.cat([value] * times)

        kwargs = {
            key: value if key in NOT_ROWS else tree_map(repeat, value)
            for key, value in self.kwargs.items()
        }
        return Call(self.forward, tree_map(repeat, self.args), kwargs)

    def same(self, other: Call) -> bool:
        """Whether both ask the same, element for element."""
        (ours, ours_shape), (theirs, theirs_shape) = (
            tree_flatten((self.args, self.kwargs)),
            tree_flatten((other.args, other.kwargs)),
        )
        return ours_shape == theirs_shape and all(_equal(a, b) for a, b in zip(ours, theirs))


class FullAnchor:
    """A second network beside the reference's: no submodule of it, so that nobody moves, saves or counts it; it follows its input instead.

    Raises ValueError for weights that are not those of the reference's architecture.
    """

    def __init__(self, denoiser: Any, anchor: Anchor, family: str) -> None:
        self.denoiser, self.anchor = denoiser, anchor
        self._placed: Any = (
            None  # where the network is and how precise: both are dear to ask it for at every step
        )
        self._network: Any = None
        device = (
            torch.device("cpu") if denoiser.device.type == "meta" else denoiser.device
        )  # meta: offloaded layer by layer
        ours, theirs = (
            base_parameters(denoiser),
            dict(self.network(device, denoiser.dtype).named_parameters()),
        )
        for name in sorted(ours.keys() | theirs.keys()):
            shapes = [
                tuple(side[name].shape) if name in side else "missing" for side in (theirs, ours)
            ]
            if shapes[0] != shapes[1]:
                said = f"{name} is {shapes[0]} in the anchor and {shapes[1]} in the pipeline"
                raise ValueError(
                    f"the anchor {anchor.source} does not fit the {family} pipeline: {said}; give an anchor of its family"
                )

    def network(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        if self._placed != (device, dtype):
            self._network, self._placed = (
                self.anchor.network(self.denoiser, device, dtype),
                (device, dtype),
            )
            _compile_like(self.denoiser, self._network)
        return self._network

    def output(self, call: Call) -> Any:
        """The anchor's output for the reference's arguments, on their device and in their precision."""
        return self.network(call.x.device, call.x.dtype)(*call.args, **call.kwargs)


class Networks:
    """Reference and anchors on one input.

    batched: a LoRA anchor's rows and the reference's go through the network as one batch. shared_start: a chain's first step is kept and
    answered from memory when it is asked again, as for every lambda of a sweep that starts from the same noise. What the arguments do not
    show, such as the scale of an IP-Adapter, must not change meanwhile.
    """

    def __init__(
        self, anchors: Sequence[Adapter | FullAnchor], batched: bool, shared_start: bool
    ) -> None:
        self.anchors, self.batched, self.shared_start = anchors, batched, shared_start
        self.evaluated = 0  # rows
        self._first: tuple[Call, dict[int, Any]] | None = None
        if batched and not any(isinstance(anchor, Adapter) for anchor in anchors):
            raise ValueError(
                "batched=True evaluates a LoRA anchor and its reference as one batch, and a full anchor is another network"
            )
        for anchor in anchors:
            if batched and isinstance(anchor, Adapter):
                anchor.check_rows()

    def __call__(self, call: Call, wanted: Sequence[bool], starts: bool = False) -> list[Any]:
        """The outputs of the reference and of each anchor, None for what is not wanted. starts: a chain does."""
        known = self._remembered(call) if starts and self.shared_start else {}
        missing = [i for i, want in enumerate(wanted) if want and i not in known]
        known.update(zip(missing, self._evaluate(call, missing)))
        self.evaluated += len(missing) * len(call.x)
        return [known[i] if want else None for i, want in enumerate(wanted)]

    def _remembered(self, call: Call) -> dict[int, Any]:
        if self._first is None or not self._first[0].same(call):
            kept = Call(
                call.forward,
                *tree_map(
                    lambda v: v.clone() if isinstance(v, Tensor) else v, (call.args, call.kwargs)
                ),
            )
            self._first = kept, {}
        return self._first[1]

    def _evaluate(self, call: Call, models: Sequence[int]) -> list[Any]:
        together = (
            [i for i in models if i == 0 or isinstance(self.anchors[i - 1], Adapter)]
            if self.batched
            else []
        )
        joint = dict(zip(together, self._as_one_batch(call, together))) if len(together) > 1 else {}
        return [
            joint[i] if i in joint else self.anchors[i - 1].output(call) if i else call()
            for i in models
        ]

    def _as_one_batch(self, call: Call, models: Sequence[int]) -> list[Any]:
        rows = len(call.x)
        with ExitStack() as stack:
            for place, i in enumerate(models):
                if i:
                    strengths = torch.zeros(len(models), rows, device=call.x.device)
                    strengths[place] = 1
                    stack.enter_context(self.anchors[i - 1].on(strengths.flatten()))  # type: ignore[union-attr]
            output = call.repeated(len(models))()
        return [with_tensor(output, chunk) for chunk in output[0].chunk(len(models))]


def _compile_like(denoiser: Any, network: Any) -> None:
    """Compile the anchor's network where the pipeline's is, whole or block by block."""
    for whole in (True, False):
        ours, theirs = (([n] if whole else list(n.modules())[1:]) for n in (denoiser, network))
        if any(module._compiled_call_impl for module in ours):
            if not any(module._compiled_call_impl for module in theirs):
                network.compile() if whole else network.compile_repeated_blocks()
            return


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """A network's output of the same kind, tuple or diffusers output, around another tensor."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else type(output)(sample=tensor)


def base_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """A network's own parameters by the names that they have without any LoRA on it."""
    return {
        name.replace(".base_layer.", "."): p
        for name, p in denoiser.named_parameters()
        if ".lora_" not in name
    }


def check_own_loras(denoiser: nn.Module) -> None:
    """ValueError where a LoRA of the user's acts on the reference network, and so not on a full anchor beside it."""
    styled = [
        name
        for layer in lora_layers(denoiser)
        if not layer.disable_adapters
        for name in layer.active_adapters
    ]
    if styled:
        said = (
            f"the pipeline's own LoRA ({styled[0]}) is on the reference alone, not on a full anchor"
        )
        raise ValueError(
            f"{said}: call pipe.unload_lora_weights() or pipe.disable_lora() first, or use mode='weights'"
        )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and a == b
