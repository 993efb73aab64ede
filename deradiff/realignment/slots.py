"""The places of a network's weights, into which other weights are put for one evaluation.

The network then computes with them in all that it has become since it was loaded: processors,
caches, FreeU, hooks, fused projections, adapters of the user's and compiled code are its own.

Names are those of the network without any LoRA on it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import PrefixedDataset, named_module_tensors
from torch import Tensor, nn

LOADING = threading.RLock()
"""Held while weights are loaded: the libraries change torch's modules for that time, for all
threads."""

LORA_PART = ".lora_"
"""What the names of a LoRA's own weights contain."""


class Slot(NamedTuple):
    """Where a network keeps one of its weights.

    Attributes:
        container: the mapping that holds it: a module's parameters or buffers, or the weights that
            accelerate has taken off the device.
        key: its key there.
        own: the network's own weight.
    """

    container: dict[str, Any]
    key: str
    own: Tensor


def slots_of(denoiser: nn.Module) -> dict[str, Slot]:
    """The slots of all weights of a network by name: parameters and persistent buffers.

    Raises:
        ValueError: for weights that are offloaded to disk.
    """
    slots = {}
    offloaded = _offloaded_slots(denoiser)
    for path, module in denoiser.named_modules():
        for container in (module._parameters, module._buffers):
            for key, weight in container.items():
                name = f"{path}.{key}" if path else key
                is_saved = key not in module._non_persistent_buffers_set
                if weight is None or not is_saved or LORA_PART in f".{name}":
                    continue
                slot = Slot(container, key, weight)  # type: ignore[arg-type]
                plain_name = name.replace(".base_layer.", ".")
                slots[plain_name] = offloaded.get(name, slot)
    return slots


def is_current(slot: Slot) -> bool:
    """Whether the network still keeps that weight there."""
    return slot.container.get(slot.key) is slot.own


@contextmanager
def in_place(slots: Sequence[Slot], weights: Sequence[Tensor]) -> Iterator[None]:
    """Put weights into slots, and the network's own back afterwards.

    Args:
        slots: the slots.
        weights: a weight for each slot.
    """
    try:
        for slot, weight in zip(slots, weights):
            slot.container[slot.key] = weight
        yield
    finally:
        for slot in slots:
            slot.container[slot.key] = slot.own


def fitted(
    weights: Mapping[str, Tensor], slots: Mapping[str, Slot], device: torch.device | None = None
) -> list[Tensor]:
    """Weights as the network would hold them: on the device and in the precision of its own.

    Args:
        weights: by the names of the slots.
        slots: the slots.
        device: where the weights are kept; None: where the network has its own.

    Returns:
        A weight for each slot, in their order. Parameters want gradients where the network's do:
        torch computes some products in another order where they are wanted.
    """
    result = []
    for name, slot in slots.items():
        own = slot.own
        own_device = torch.device("cpu") if own.device.type == "meta" else own.device
        weight = weights[name].detach().to(device or own_device, own.dtype)
        if isinstance(own, nn.Parameter):
            weight = nn.Parameter(weight, requires_grad=own.requires_grad)
        result.append(weight)
    return result


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is kept in a form that is not its value, such as 4 bits."""
    is_plain = type(weight) in (Tensor, nn.Parameter, nn.Buffer)
    return not is_plain or not weight.is_floating_point()


def _offloaded_slots(denoiser: nn.Module) -> dict[str, Slot]:
    """The slots of the weights that accelerate keeps off the device between evaluations.

    Returns:
        By the names that they have in the network as it is.
    """
    slots = {}
    for path, module in denoiser.named_modules():
        hook = _offload_hook(module)
        if hook is None:
            continue
        tensors = named_module_tensors(
            module, include_buffers=hook.offload_buffers, recurse=hook.place_submodules
        )
        for name, _ in tensors:
            container = hook.weights_map
            key = name
            if isinstance(container, PrefixedDataset):
                key = f"{container.prefix}{name}"
                container = container.dataset
            if not isinstance(container, dict):
                raise ValueError(
                    "the pipeline's network is offloaded to disk, where an anchor's weights cannot "
                    "take the place of its own: use pipe.enable_model_cpu_offload(), or a LoRA "
                    "anchor"
                )
            full_name = f"{path}.{name}" if path else name
            slots[full_name] = Slot(container, key, container[key])
    return slots


def _offload_hook(module: nn.Module) -> Any:
    """accelerate's hook that brings a module's weights to the device; None where there is none."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    for candidate in hooks:
        is_offload = isinstance(candidate, AlignDevicesHook) and candidate.offload
        if is_offload and candidate.weights_map is not None:
            return candidate
    return None
