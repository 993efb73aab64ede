"""A LoRA anchor as weights of its own, so that its network costs what the reference's does.

A LoRA beside the network is two more products in each of its layers, and on a GPU the host calls
these hundreds of layers more slowly than the device computes them. Where there is memory for a
second set of these weights, they are the reference's plus the LoRA's delta, computed once a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from torch import nn

from deradiff.realignment.adapters import Adapter
from deradiff.realignment.full_anchor import GROUP_OFFLOADING
from deradiff.realignment.slots import Slot, is_quantised, slots_of
from deradiff.realignment.summed_weights import SummedWeights

SHARE = 0.5
"""Of a GPU's memory, the part that a network and its anchors' weights may take together."""


class MergedLora:
    """The weights of a LoRA's layers with its delta added.

    Args:
        adapter: the anchor.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._weights = SummedWeights(adapter.denoiser)

    def forget(self) -> None:
        """Have the weights computed anew: the network's own, or the LoRA's, may have changed."""
        self._weights.forget()

    def output(self, call: Any) -> Any:
        """The output of the reference's network with these weights.

        Args:
            call: evaluates the network.
        """
        if not self._weights.is_current:
            self._weights.compute([(self.adapter, 1.0)])
        with self._weights.in_place():
            return call()


def mergeable(adapters: Sequence[Adapter], memory: str) -> list[Adapter]:
    """The LoRA anchors that get weights of their own.

    Args:
        adapters: on one network.
        memory: `low`: none; `high`: all that can be merged; `auto`: these, on a GPU that has the
            memory.
    """
    if memory == "low" or not adapters:
        return []
    network = adapters[0].denoiser
    if _has_group_offloading(network):
        return []
    slots = slots_of(network)
    candidates = [adapter for adapter in adapters if _is_mergeable(adapter, slots)]
    if memory == "auto" and not _fits(network, candidates, slots):
        return []
    return candidates


def _is_mergeable(adapter: Adapter, slots: dict[str, Slot]) -> bool:
    """Whether the anchor is a sum of weights, and the network's are where they are computed."""
    if not adapter.is_sum:
        return False
    for path in adapter.layers:
        weight = slots[f"{path}.weight"].own
        if is_quantised(weight) or weight.dtype.itemsize == 1 or weight.device.type == "meta":
            return False
    return True


def _fits(network: nn.Module, adapters: Sequence[Adapter], slots: dict[str, Slot]) -> bool:
    """Whether the weights take a fair part of a GPU's memory.

    What is asked for is the memory that the card has, not what is free: the same command then
    computes in the same way, whatever else runs.
    """
    device = next(network.parameters()).device
    if device.type != "cuda":
        return False
    total = sum(parameter.nbytes for parameter in network.parameters())
    for adapter in adapters:
        total += sum(slots[f"{path}.weight"].own.nbytes for path in adapter.layers)
    return total <= SHARE * torch.cuda.get_device_properties(device).total_memory


def _has_group_offloading(network: nn.Module) -> bool:
    """Whether diffusers moves groups of layers to the device and back."""
    for module in network.modules():
        registry: HookRegistry | None = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.get_hook(GROUP_OFFLOADING) is not None:
            return True
    return False
