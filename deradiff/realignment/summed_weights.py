"""Weights of the reference plus those of anchors, kept beside the network's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
        # The sums by name. The next ones are written where they lie: a CUDA graph reads them there.
        self._by_name: dict[str, Tensor] = {}
        self._is_stale = False

    def clear(self) -> None:
        """Give the memory of the sums back."""
        self._slots = []
        self._sums = []
        self._by_name = {}

    def forget(self) -> None:
        """Note that the sums have to be computed anew."""
        self._is_stale = True

    @property
    def is_current(self) -> bool:
        """Whether there are sums, and the network is where and in what precision it was."""
        if not self._slots or self._is_stale:
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
        # There may be no memory for old and new sums: each takes the place of its predecessor.
        slots = slots_of(self.denoiser)
        owns = {name: slot.own.detach() for name, slot in slots.items()}
        sums = _Sums(owns, self._by_name)
        _add_full_anchors(sums, anchors)
        _add_loras(sums, anchors)

        self.clear()
        for name, slot in slots.items():
            total = sums.values[name]
            if total is owns[name]:
                continue
            self._by_name[name] = total
            if isinstance(slot.own, nn.Parameter):
                total = nn.Parameter(total, requires_grad=slot.own.requires_grad)
            self._slots.append(slot)
            self._sums.append(total)
        self._is_stale = False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the network compute with the sums."""
        with in_place(self._slots, self._sums):
            yield


class _Sums:
    """Sums in the making, by name.

    Args:
        owns: the reference's weights, which every sum begins with.
        memory: earlier sums, whose memory is used again.

    Attributes:
        values: the sums as far as they are.
    """

    def __init__(self, owns: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> None:
        self.values = dict(owns)
        self._memory = memory

    def put(self, name: str, total: Tensor) -> None:
        """Take a sum, in the precision of the reference's weight."""
        total = total.to(self.values[name].dtype)
        old = self._memory.get(name)
        is_alike = old is not None and (old.shape, old.dtype, old.device) == (
            total.shape,
            total.dtype,
            total.device,
        )
        self.values[name] = old.copy_(total) if old is not None and is_alike else total


def asks_for_scale(kwargs: dict[str, Any]) -> bool:
    """Whether a call of the network scales the LoRAs on it, such as diffusers' `scale`.

    Args:
        kwargs: the keyword arguments of the call, of which some are dictionaries for attention.
    """
    for name, value in kwargs.items():
        if name.endswith("attention_kwargs") and isinstance(value, dict) and "scale" in value:
            return True
    return False


def _add_full_anchors(sums: _Sums, anchors: Sequence[WeightedAnchor]) -> None:
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
        own = sums.values[name]
        if not is_mixable(own):
            continue
        # One tensor at a time: the anchors' weights may lie elsewhere, for want of memory.
        theirs = [own_weights[name].detach().to(own.device) for own_weights in weights]
        sums.put(name, weighted_sum([own, *theirs], [1 - sum(lams), *lams]))


def _add_loras(sums: _Sums, anchors: Sequence[WeightedAnchor]) -> None:
    """LoRA anchors: plus lam_i times the delta of each layer. Raises ValueError."""
    for anchor, lam in anchors:
        if not isinstance(anchor, Adapter):
            continue
        for name, delta in anchor.deltas():
            own = sums.values[name]
            if is_quantised(own):
                raise ValueError(
                    f"mode='weights' sums weights, and {name} of the pipeline's network is "
                    "quantised: use mode='exact'"
                )
            sums.put(name, linear_combination([own.float(), delta.float()], [1.0, lam]))
