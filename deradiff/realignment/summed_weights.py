"""Weights of the reference plus those of anchors, kept beside the network's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from deradiff.realignment.adapters import Adapter
from deradiff.realignment.full_anchor import FullAnchor
from deradiff.realignment.slots import Slot, in_place, is_current, is_quantised, slots_of
from deradiff.realignment.sums import is_mixable, linear_combination, weighted_sum

WeightedAnchor = tuple[Adapter | FullAnchor, float]
"""An anchor and its lam."""


class SummedWeights:
    """theta_ref + sum lam_i (theta_i - theta_ref). Of a LoRA, theta_i - theta_ref is its delta.

    Only weights that differ from the reference's are kept.

    Args:
        denoiser: the reference network, whose weights theta_ref are.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser
        # The sums, and the places of the reference's weights that they take.
        self._slots: list[Slot] = []
        self._sums: list[Tensor] = []

    def clear(self) -> None:
        """Give the memory of the sums back."""
        self._slots = []
        self._sums = []

    @property
    def is_current(self) -> bool:
        """Whether there are sums, and the network is where and in what precision it was."""
        if not self._slots:
            return False
        for slot, total in zip(self._slots, self._sums):
            is_moved = total.device != slot.own.device and slot.own.device.type != "meta"
            if not is_current(slot) or is_moved or total.dtype != slot.own.dtype:
                return False
        return True

    def compute(self, anchors: Sequence[WeightedAnchor]) -> None:
        """Compute the sums.

        Args:
            anchors: with the lam of each.

        Raises:
            ValueError: for a network of quantised weights.
        """
        # The old sums go first: there may be no memory for both.
        self.clear()
        slots = slots_of(self.denoiser)
        owns = {name: slot.own.detach() for name, slot in slots.items()}
        sums = dict(owns)
        _add_full_anchors(sums, anchors)
        _add_loras(sums, anchors)
        for name, slot in slots.items():
            total = sums[name]
            if total is owns[name]:
                continue
            if isinstance(slot.own, nn.Parameter):
                total = nn.Parameter(total, requires_grad=slot.own.requires_grad)
            self._slots.append(slot)
            self._sums.append(total)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the network compute with the sums."""
        with in_place(self._slots, self._sums):
            yield


def asks_for_scale(kwargs: dict[str, Any]) -> bool:
    """Whether a call of the network scales the LoRAs on it, such as diffusers' `scale`.

    Args:
        kwargs: the keyword arguments of the call, of which some are dictionaries for attention.
    """
    for name, value in kwargs.items():
        if name.endswith("attention_kwargs") and isinstance(value, dict) and "scale" in value:
            return True
    return False


def _add_full_anchors(sums: dict[str, Tensor], anchors: Sequence[WeightedAnchor]) -> None:
    """Full anchors: theta_ref + sum lam_i (theta_i - theta_ref), by name, in place of theta_ref."""
    weights: list[dict[str, Tensor]] = []
    lams: list[float] = []
    for anchor, lam in anchors:
        if isinstance(anchor, FullAnchor):
            weights.append(anchor.weights())
            lams.append(lam)
    if not weights:
        return
    for name in weights[0]:
        if not is_mixable(sums[name]):
            continue
        # One tensor at a time: the anchors' weights may lie elsewhere, for want of memory.
        device = sums[name].device
        theirs = [own_weights[name].detach().to(device) for own_weights in weights]
        sums[name] = weighted_sum([sums[name], *theirs], [1 - sum(lams), *lams])


def _add_loras(sums: dict[str, Tensor], anchors: Sequence[WeightedAnchor]) -> None:
    """LoRA anchors: plus lam_i times the delta of each layer. Raises ValueError."""
    for anchor, lam in anchors:
        if not isinstance(anchor, Adapter):
            continue
        for name, delta in anchor.deltas():
            if is_quantised(sums[name]):
                raise ValueError(
                    f"mode='weights' sums weights, and {name} of the pipeline's network is "
                    "quantised: use mode='exact'"
                )
            total = linear_combination([sums[name].float(), delta.float()], [1.0, lam])
            sums[name] = total.to(sums[name].dtype)
