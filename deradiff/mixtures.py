"""Two ways to evaluate a realigned denoiser: a weighted sum of the networks' outputs, or one network of summed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deradiff.adapters import Adapter, lora_layers
from deradiff.anchors import Anchor

Forward = Callable[..., Any]
"""The reference network's own forward: arguments as the pipeline gives them, a tuple or a diffusers output back."""


class FullAnchor:
    """A second network beside the reference's: no submodule of it, so that nobody moves, saves or counts it; it follows its input instead.

    Raises ValueError for weights that are not those of the reference's architecture.
    """

    def __init__(self, denoiser: nn.Module, anchor: Anchor, family: str) -> None:
        self.denoiser, self.anchor = denoiser, anchor
        ours, theirs = base_parameters(denoiser), dict(self.network(denoiser.device, denoiser.dtype).named_parameters())  # type: ignore[arg-type]
        for name in sorted(ours.keys() | theirs.keys()):
            shapes = [tuple(side[name].shape) if name in side else "missing" for side in (theirs, ours)]
            if shapes[0] != shapes[1]:
                said = f"{name} is {shapes[0]} in the anchor and {shapes[1]} in the pipeline"
                raise ValueError(f"the anchor {anchor.source} does not fit the {family} pipeline: {said}; give an anchor of its family")

    def network(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return self.anchor.network(self.denoiser, device, dtype)

    def output(self, forward: Forward, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The anchor's output for the reference's arguments, on their device and in their precision."""
        x = args[0] if args else kwargs["sample"]
        return self.network(x.device, x.dtype)(*args, **kwargs)


class OutputMixture:
    """Mode `exact`: out_ref + sum lam_i (out_i - out_ref), each network on the same input. A network of weight 0 is not evaluated."""

    def __init__(self, denoiser: nn.Module, anchors: Sequence[Adapter | FullAnchor], with_reference: bool) -> None:
        self.anchors, self.with_reference = anchors, with_reference
        styled = [name for layer in lora_layers(denoiser) if not layer.disable_adapters for name in layer.active_adapters]
        if styled and any(isinstance(anchor, FullAnchor) for anchor in anchors):
            said = f"the pipeline's own LoRA ({styled[0]}) is on the reference alone, not on a full anchor"
            raise ValueError(f"{said}: call pipe.unload_lora_weights() or pipe.disable_lora() first, or use mode='weights'")

    def __call__(self, forward: Forward, args: Sequence[Any], kwargs: dict[str, Any], lams: Sequence[float]) -> tuple[Any, Any | None]:
        """The realigned output, and the reference's where it was evaluated."""
        rest = 1 - sum(lams)
        reference = forward(*args, **kwargs) if rest != 0 or self.with_reference else None
        outputs = [anchor.output(forward, args, kwargs) for anchor, lam in zip(self.anchors, lams) if lam != 0]
        weights = [lam for lam in lams if lam != 0]
        if rest != 0:
            outputs, weights = [reference, *outputs], [rest, *weights]
        mixed = weighted_sum([output[0] for output in outputs], weights)
        first = outputs[0]
        return (mixed, *first[1:]) if isinstance(first, tuple) else type(first)(sample=mixed), reference


class WeightMixture:
    """Mode `weights`: the reference network at theta_ref + sum lam_i (theta_i - theta_ref), and a LoRA at lam times its scale.

    The summed weights are in place only while the network runs: at all other times the reference holds its own tensors.
    """

    def __init__(self, denoiser: nn.Module, anchors: Sequence[Adapter | FullAnchor], with_reference: bool) -> None:
        self.denoiser, self.anchors, self.with_reference = denoiser, anchors, with_reference
        self._made: tuple[Any, list[Tensor]] = (None, [])

    def __call__(self, forward: Forward, args: Sequence[Any], kwargs: dict[str, Any], lams: Sequence[float]) -> tuple[Any, Any | None]:
        """The realigned output, and the reference's where it was evaluated."""
        if not any(lams):
            output = forward(*args, **kwargs)
            return output, output
        with self._weights(lams):
            output = forward(*args, **kwargs)
        return output, forward(*args, **kwargs) if self.with_reference else None

    @contextmanager
    def _weights(self, lams: Sequence[float]) -> Iterator[None]:
        full = [(anchor, lam) for anchor, lam in zip(self.anchors, lams) if isinstance(anchor, FullAnchor) and lam != 0]
        with ExitStack() as stack:
            for anchor, lam in zip(self.anchors, lams):
                if isinstance(anchor, Adapter) and lam != 0:
                    stack.enter_context(anchor.on(lam))
            if full:
                stack.enter_context(_swapped(list(base_parameters(self.denoiser).values()), self._summed(full)))
            yield

    def _summed(self, full: Sequence[tuple[FullAnchor, float]]) -> list[Tensor]:
        """theta_ref + sum lam_i (theta_i - theta_ref), kept until a lam, the device or the precision changes."""
        ours, lams = base_parameters(self.denoiser), [lam for _, lam in full]
        device, dtype = self.denoiser.device, self.denoiser.dtype
        if self._made[0] != (lams, device, dtype):
            self._made = (None, [])  # let the old sum go before the new one is made
            theirs = [dict(anchor.network(device, dtype).named_parameters()) for anchor, _ in full]  # type: ignore[arg-type]
            rest = 1 - sum(lams)
            summed = [weighted_sum([p.data, *(t[name].data for t in theirs)], [rest, *lams]) for name, p in ours.items()]
            self._made = ((lams, device, dtype), summed)
        return self._made[1]


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum w_i t_i in at least single precision, rounded once; a tensor that has all the weight is returned as it is."""
    parts = [(tensor, weight) for tensor, weight in zip(tensors, weights) if weight != 0]
    if len(parts) == 1:
        return parts[0][0]
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([weight * tensor.to(wide) for tensor, weight in parts]).sum(0).to(tensors[0].dtype)


def base_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """A network's own parameters by the names that they have without any LoRA on it."""
    return {name.replace(".base_layer.", "."): p for name, p in denoiser.named_parameters() if ".lora_" not in name}


@contextmanager
def _swapped(parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> Iterator[None]:
    originals = [parameter.data for parameter in parameters]
    try:
        for parameter, tensor in zip(parameters, tensors):
            parameter.data = tensor
        yield
    finally:
        for parameter, original in zip(parameters, originals):
            parameter.data = original
