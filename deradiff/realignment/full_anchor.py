"""A full anchor: other weights for the reference's own network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from torch import Tensor, nn

from deradiff.anchors.anchor import Anchor
from deradiff.realignment.slots import (
    LOADING,
    Slot,
    fitted,
    in_place,
    is_current,
    is_quantised,
    slots_of,
)

ADDED_PARTS = (".processor.", "encoder_hid_proj.", "image_proj.")
"""Parts of the names of what an IP-Adapter adds to a network."""

FUSED_LAYERS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""The layers that diffusers makes of several others, one below the other."""

GROUP_OFFLOADING = "group_offloading"
"""The name of diffusers' hook that moves groups of layers to the device."""


class FullAnchor:
    """A full anchor, whose weights take the places of the reference's for an evaluation.

    So the anchor's network is the reference's module as it stands at the call. What the user has
    put on it, an IP-Adapter or a LoRA, acts on both.

    Args:
        denoiser: the reference network.
        anchor: the full anchor.
        pipeline: how an error names the pipeline.
        on_cpu: keep the weights on the CPU, for one who reads them one by one and never evaluates
            the anchor.

    Raises:
        ValueError: for weights of another architecture than the reference's, and for a reference
            whose weights others cannot take the places of.
    """

    def __init__(self, denoiser: Any, anchor: Anchor, pipeline: str, on_cpu: bool = False) -> None:
        self.denoiser = denoiser
        self.anchor = anchor
        self.pipeline = pipeline
        self.on_cpu = on_cpu
        self._slots: dict[str, Slot] = {}
        self._weights: list[Tensor] = []
        # The device and precision that the weights were fitted to.
        self._placement: tuple[torch.device, torch.dtype] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Look at the reference's network anew: it may have been moved, cast or changed.

        Raises:
            ValueError: as the constructor.
        """
        _check_offloading(self.denoiser)
        slots = slots_of(self.denoiser)
        first = _first_weight(slots)
        is_offloaded = first.device.type == "meta"
        device = torch.device("cpu") if is_offloaded or self.on_cpu else first.device
        with LOADING:
            network = self.anchor.network(self.denoiser, device, self.denoiser.dtype)

        weights = dict(network.state_dict())
        _fuse(weights, slots)
        self._check_fits(weights, slots)
        own_slots = {name: slot for name, slot in slots.items() if name in weights}
        placement = (first.device, first.dtype)
        if _are_same(own_slots, self._slots) and self._placement == placement:
            return
        self._slots = own_slots
        self._weights = fitted(weights, own_slots, device if self.on_cpu else None)
        self._placement = placement

    def output(self, call: Any) -> Any:
        """The output of the reference's network with the anchor's weights.

        Args:
            call: evaluates the network.
        """
        with in_place(list(self._slots.values()), self._weights):
            return call()

    def weights(self) -> dict[str, Tensor]:
        """The anchor's weights by name, in the precision of the reference's.

        They are on the reference's device, or on the CPU (`on_cpu`).
        """
        return dict(zip(self._slots, self._weights))

    def follow(self) -> None:
        """Bind the weights anew where the reference's are no longer what they were."""
        first = _first_weight(self._slots)
        is_moved = self._placement != (first.device, first.dtype)
        if is_moved or not all(map(is_current, self._slots.values())):
            self.refresh()

    def _check_fits(self, weights: Mapping[str, Tensor], slots: Mapping[str, Slot]) -> None:
        """Raise ValueError where the anchor's weights are not the network's."""
        for name in sorted(weights.keys() | slots.keys()):
            own_shape = tuple(slots[name].own.shape) if name in slots else "missing"
            shape = tuple(weights[name].shape) if name in weights else "missing"
            is_added = name not in weights and any(part in f".{name}" for part in ADDED_PARTS)
            if own_shape == shape or is_added:
                continue
            if name in slots and is_quantised(slots[name].own):
                break
            raise ValueError(
                f"the anchor {self.anchor.source} does not fit the {self.pipeline} pipeline: "
                f"{name} is {shape} in the anchor and {own_shape} in the pipeline; give an anchor "
                "of its family"
            )
        for name, slot in slots.items():
            if is_quantised(slot.own):
                raise ValueError(
                    f"the pipeline's network is quantised ({name} is a "
                    f"{type(slot.own).__name__} of {slot.own.dtype}), and the full anchor "
                    f"{self.anchor.source} is not: give a LoRA anchor, or load the pipeline "
                    "without quantisation"
                )


def _first_weight(slots: Mapping[str, Slot]) -> Tensor:
    """The first weight as the network has it now, which may have been moved since."""
    slot = next(iter(slots.values()))
    return slot.container.get(slot.key, slot.own)


def _are_same(slots: Mapping[str, Slot], others: Mapping[str, Slot]) -> bool:
    """Whether two sets of slots hold the same weights in the same places."""
    if slots.keys() != others.keys():
        return False
    for name, slot in slots.items():
        other = others[name]
        if slot.container is not other.container or slot.own is not other.own:
            return False
    return True


def _fuse(weights: dict[str, Tensor], slots: Mapping[str, Slot]) -> None:
    """Add the layers that diffusers has made of others in the reference's network.

    They are what they claim to be: the reference's own parts give the reference's own layer.
    """
    for name in slots.keys() - weights.keys():
        path, _, part = name.rpartition(".")
        parent, _, layer = path.rpartition(".")
        parts = [f"{parent}.{source}.{part}" for source in FUSED_LAYERS.get(layer, ())]
        if not parts or not all(source in weights and source in slots for source in parts):
            continue
        own = torch.cat([slots[source].own for source in parts])
        if torch.equal(own, slots[name].own):
            weights[name] = torch.cat([weights[source] for source in parts])


def _check_offloading(denoiser: nn.Module) -> None:
    """Raise ValueError where diffusers keeps copies of the weights that it moves."""
    for module in denoiser.modules():
        registry: HookRegistry | None = getattr(module, "_diffusers_hook", None)
        hook = registry.get_hook(GROUP_OFFLOADING) if registry else None
        if hook is None:
            continue
        group: Any = hook.group  # type: ignore[attr-defined]
        moves_one_by_one = group.parameters and group.onload_device.type != "cpu"
        if group.stream is not None or group.offload_to_disk_path or moves_one_by_one:
            raise ValueError(
                "group offloading keeps copies of the pipeline's own weights, which a full anchor "
                "cannot take the place of: use pipe.enable_model_cpu_offload(), or a LoRA anchor"
            )
