"""Anchors that are in memory: an aligned pipeline or network, and an adapter that is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from deradiff.anchors.anchor import Anchor
from deradiff.anchors.lora_files import LoraWeights
from deradiff.models.family import unwrapped
from deradiff.models.pipelines import denoiser_name, denoiser_names

IN_MEMORY = "in memory"


@dataclass
class LiveNetworks(Anchor):
    """Aligned networks that the user holds. They are read, and never moved, cast or changed.

    Attributes:
        networks: by the pipeline's attribute; of a network alone under "".
    """

    networks: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    def network(self, like: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The network, as the user holds it: whoever takes its weights brings copies elsewhere.

        Args:
            like: the reference.
            device: where the weights are wanted.
            dtype: their precision.

        Raises:
            ValueError: for the reference itself, and for a network with adapters in it.
        """
        network = self.networks[self.weights]
        if network is like:
            raise ValueError(
                f"the anchor {self.source} is the pipeline's own network: give the aligned one"
            )
        if any(isinstance(module, BaseTunerLayer) for module in network.modules()):
            raise ValueError(
                f"the anchor {self.source} has adapters loaded: fuse and unload them, or give the "
                "adapter itself, deradiff.adapter_anchor(pipe, name)"
            )
        return network

    def part(self, denoiser: str) -> Anchor:
        """The anchor of another denoiser of the same pipeline.

        Args:
            denoiser: the pipeline's attribute.

        Raises:
            ValueError: where the pipeline that is the anchor has no such denoiser.
        """
        if denoiser not in self.networks:
            raise ValueError(
                f"the anchor {self.source} has no {denoiser}, and the pipeline has: give an "
                "aligned pipeline with both"
            )
        return LiveNetworks(
            source=self.source,
            root="",
            weights=denoiser,
            method="full",
            network_class=type(self.networks[denoiser]).__name__,
            networks=self.networks,
        )


@dataclass
class LiveAdapter(Anchor):
    """A copy of a LoRA that was loaded into a pipeline.

    Attributes:
        adapter: its name there.
        loras: its weights, by the pipeline's attribute.
    """

    adapter: str = ""
    loras: dict[str, LoraWeights] = field(default_factory=dict, repr=False)

    def lora(self, pipe: Any, denoiser: str | None = None) -> LoraWeights:
        """The weights for the pipeline's denoiser, in peft's names.

        Args:
            pipe: the pipeline to realign.
            denoiser: the attribute of one of several denoisers; None: the first.

        Raises:
            ValueError: where the adapter is active in the pipeline, and so a part of the
                reference, or where it has no weights for the denoiser.
        """
        name = denoiser or denoiser_name(pipe)
        if self.adapter in _active_adapters(unwrapped(getattr(pipe, name))):
            raise ValueError(
                f"the adapter {self.adapter} is active in the pipeline, so that the reference has "
                f"it, too: after adapter_anchor, type pipe.delete_adapters({self.adapter!r})"
            )
        if name not in self.loras:
            raise ValueError(
                f"the adapter {self.adapter} has no weights for the pipeline's {name}, but for "
                f"{' and '.join(self.loras)}"
            )
        return self.loras[name]


def live_anchor(source: Any) -> Anchor:
    """The anchor that a pipeline or a network in memory is.

    Args:
        source: a diffusers pipeline with a denoiser, or a network.

    Raises:
        ValueError: for anything else.
    """
    kind = type(source).__name__
    if isinstance(source, nn.Module):
        networks = {"": unwrapped(source)}
    elif hasattr(source, "components"):
        names = [denoiser_name(source), *denoiser_names(source)]
        networks = {name: unwrapped(getattr(source, name)) for name in dict.fromkeys(names)}
    else:
        raise ValueError(
            f"an anchor is a path, a hub id, a loaded anchor, a pipeline or a network, and not "
            f"{kind}"
        )
    first = next(iter(networks))
    return LiveNetworks(
        source=f"{kind} {IN_MEMORY}",
        root="",
        weights=first,
        method="full",
        network_class=type(networks[first]).__name__,
        parts=tuple(networks),
        networks=networks,
    )


def adapter_anchor(pipe: Any, name: str) -> Anchor:
    """Take a LoRA that is loaded into a pipeline as an anchor.

    Its weights are copied: delete it from the pipeline afterwards, so that it acts in the anchor
    alone.

    Args:
        pipe: a diffusers pipeline with the adapter.
        name: of the adapter, as `pipe.load_lora_weights(..., adapter_name=name)` gave it.

    Returns:
        The anchor, for `deradiff.realign`.

    Raises:
        ValueError: where no denoiser has an adapter of that name.

    Example:
        ```python
        pipe.load_lora_weights("my_lora", adapter_name="mine")
        anchor = deradiff.adapter_anchor(pipe, "mine")
        pipe.delete_adapters("mine")
        dial = deradiff.realign(pipe, anchor, lam=0.5)
        ```
    """
    loras = {}
    known: set[str] = set()
    for attribute in denoiser_names(pipe):
        network: Any = unwrapped(getattr(pipe, attribute))
        configs = getattr(network, "peft_config", {})
        known.update(configs)
        if name in configs:
            loras[attribute] = _copied(network, name, attribute)
    if not loras:
        there = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise ValueError(f"the pipeline's denoiser has no adapter {name!r}: {there}")
    return LiveAdapter(
        source=f"adapter {name} {IN_MEMORY}",
        root="",
        weights="",
        method="lora",
        adapter=name,
        loras=loras,
    )


def _copied(network: Any, name: str, attribute: str) -> LoraWeights:
    """A copy of an adapter of a network, in the form in which a file of it is read."""
    tensors: dict[str, Tensor] = get_peft_model_state_dict(network, adapter_name=name)
    state = {}
    for key, tensor in tensors.items():
        state[f"{attribute}.{key}"] = tensor.detach().clone()
    config = network.peft_config[name].to_dict()
    metadata = {f"{attribute}.{key}": value for key, value in config.items()}
    return LoraWeights(state, metadata)


def _active_adapters(network: nn.Module) -> set[str]:
    """The adapters that act in a network."""
    active: set[str] = set()
    for module in network.modules():
        if isinstance(module, BaseTunerLayer) and not module.disable_adapters:
            active.update(module.active_adapters)
    return active
