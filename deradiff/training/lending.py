"""The network in training, lent to a pipeline for a while.

A panel is then drawn without a second copy of the denoiser in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def is_lendable(network: nn.Module) -> bool:
    """Whether the reference is in a network: it trains a LoRA, and its weights are all here."""
    has_lora = any(isinstance(module, BaseTunerLayer) for module in network.modules())
    return has_lora and not any(parameter.is_meta for parameter in network.parameters())


@contextmanager
def lent_reference(network: Any) -> Iterator[nn.Module]:
    """The reference out of a network that trains a LoRA, as a pipeline has it.

    The LoRA is off, nothing is cast or compiled, and the network is in evaluation. Afterwards all
    is as it was.

    Args:
        network: of which `is_lendable` holds.
    """
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    compiled = [module for module in network.modules() if module._compiled_call_impl is not None]
    calls = [module._compiled_call_impl for module in compiled]
    was_training = network.training
    # accelerate's autocast stands before the network's own forward.
    forward = vars(network).pop("forward", None)

    network.eval()
    for layer in layers:
        vars(layer)["_disable_adapters"] = True
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield network
    finally:
        for module, call in zip(compiled, calls):
            module._compiled_call_impl = call
        for layer in layers:
            vars(layer)["_disable_adapters"] = False
        network.train(was_training)
        if forward is not None:
            network.forward = forward
