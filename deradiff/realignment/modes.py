"""The modes of `realign`: three ways to evaluate a realigned denoiser, at two network evaluations a step, 1 + 1/k, or one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deradiff.method.lambdas import Strength
from deradiff.realignment.adapters import Adapter
from deradiff.realignment.clock import Clock
from deradiff.realignment.networks import Call, FullAnchor, Networks, base_parameters, with_tensor


@dataclass
class Mixed:
    """A realigned output, and what is known of it: how far it is from the reference's, each anchor's difference from the reference, and
    the weights that these were given, which a trust region may have lowered."""

    output: Any
    pull: Tensor | None
    differences: list[Tensor] | None = None
    lams: Sequence[Strength] = ()


class Mode(Protocol):
    """lams: a weight for each anchor, numbers or tensors that broadcast to the output. Where it is known, `bounded` may lower them."""

    def __call__(self, call: Call, lams: Sequence[Strength]) -> Mixed: ...


class Exact:
    """out_ref + sum lam_i (out_i - out_ref), each network on the same input. A network of weight 0 is not evaluated."""

    def __init__(self, networks: Networks, clock: Clock, trust: Any, with_reference: bool) -> None:
        self.networks, self.clock, self.trust, self.with_reference = (
            networks,
            clock,
            trust,
            with_reference,
        )

    def __call__(self, call: Call, lams: Sequence[Strength]) -> Mixed:
        rest = 1 - sum(lams)
        wanted = [self.with_reference or not is_zero(rest), *(not is_zero(lam) for lam in lams)]
        outputs = self.networks(call, wanted, self.clock.starts)
        known = [output for output in outputs if output is not None]
        tensors = [None if output is None else output[0] for output in outputs]
        differences = None
        if tensors[0] is not None:
            differences = [
                torch.zeros_like(tensors[0]) if t is None else t.float() - tensors[0].float()
                for t in tensors[1:]
            ]
            lams = self.trust(lams, differences)
            rest = 1 - sum(lams)
        mixed = weighted_sum(tensors, [rest, *lams])
        pull = None if differences is None else summed(differences, lams)
        return Mixed(with_tensor(known[0], mixed), pull, differences, lams)


class Reuse:
    """out + (lam or lam - 1) D, where D = out_anchor - out_ref is evaluated every k-th step and extrapolated linearly in time between.

    Between, only the network of the larger weight is evaluated, so that D's error counts by min(lam, |1 - lam|): 1 + 1/k evaluations.
    """

    def __init__(self, networks: Networks, clock: Clock, trust: Any, every: int) -> None:
        self.networks, self.clock, self.trust, self.every = networks, clock, trust, every
        self._seen: dict[
            int, list[tuple[int, float, Tensor]]
        ] = {}  # by the evaluation within a step: index, time, D; the last two

    def __call__(self, call: Call, lams: Sequence[Strength]) -> Mixed:
        (lam,), clock = lams, self.clock
        if clock.began or clock.index is None:
            self._seen = {}
        seen = self._seen.setdefault(clock.call, [])
        anchored = not isinstance(lam, Tensor) and lam > 0.5
        fresh = clock.index is None or not seen or clock.index - seen[-1][0] >= self.every
        needed = isinstance(lam, Tensor) or lam not in (0, 1)
        both = fresh and needed
        outputs = self.networks(call, [both or not anchored, both or anchored], clock.starts)
        if not needed:
            output = outputs[1 if anchored else 0]
            return Mixed(output, None if anchored else torch.zeros_like(output[0]))
        if both:
            difference = outputs[1][0].float() - outputs[0][0].float()
            seen[:] = [*seen[-1:], (clock.index or 0, clock.fraction, difference)]
        else:
            difference = _extrapolated(seen, clock.fraction)
        (lam,) = self.trust([lam], [difference])
        if both:
            mixed = weighted_sum([output[0] for output in outputs], [1 - lam, lam])
        else:
            base = outputs[1 if anchored else 0][0]
            mixed = (base.float() + (lam - 1 if anchored else lam) * difference).to(base.dtype)
        return Mixed(
            with_tensor(next(o for o in outputs if o is not None), mixed),
            lam * difference,
            [difference],
        )


class Weights:
    """One network at theta_ref + sum lam_i (theta_i - theta_ref), a LoRA's delta scaled by lam_i: mixing's first order.

    The summed weights stay in place from a chain's first step to its last: `restore` puts the reference's own back, and is called
    then, when somebody saves, and when the context is left. A LoRA alone at lam = 1 acts beside the weights, as in the stock pipeline,
    bit for bit.
    """

    def __init__(
        self, denoiser: nn.Module, networks: Networks, clock: Clock, with_reference: bool
    ) -> None:
        self.denoiser, self.networks, self.clock, self.with_reference = (
            denoiser,
            networks,
            clock,
            with_reference,
        )
        self._key: Any = None
        self._parameters: list[nn.Parameter] = []
        self._sums: list[Tensor] = []
        self._own: list[Tensor] = []  # the reference's, while the sums are in place

    def __call__(self, call: Call, lams: Sequence[Strength]) -> Mixed:
        if any(isinstance(lam, Tensor) for lam in lams):
            raise ValueError(
                "mode='weights' has one set of weights, and so one lam, for all images and regions: use mode='exact'"
            )
        numbers = [float(lam) for lam in lams]
        if not any(numbers):
            self.restore()
            (output,) = self.networks(call, [True])
            return Mixed(output, torch.zeros_like(output[0]))
        output = self._at(call, numbers)
        if not self.with_reference:
            return Mixed(output, None)
        self.restore()
        (reference,) = self.networks(call, [True])
        return Mixed(output, output[0].float() - reference[0].float())

    def _at(self, call: Call, lams: Sequence[float]) -> Any:
        """The network's output at lams."""
        anchors = [(anchor, lam) for anchor, lam in zip(self.networks.anchors, lams) if lam != 0]
        beside = [
            anchor
            for anchor, lam in anchors
            if isinstance(anchor, Adapter) and (anchor.variant or (len(anchors) == 1 and lam == 1))
        ]
        self._put(
            [(anchor, lam) for anchor, lam in anchors if anchor not in beside],
            call.x.device,
            call.x.dtype,
        )
        try:
            with ExitStack() as stack:
                for anchor, lam in anchors:
                    if anchor in beside:
                        stack.enter_context(anchor.on(lam))  # type: ignore[union-attr]
                return self.networks(call, [True])[0]
        except BaseException:
            self.restore()
            raise
        finally:
            if self.clock.index is None or self.clock.last:
                self.restore()

    def _put(
        self,
        anchors: Sequence[tuple[Adapter | FullAnchor, float]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        key = ([lam for _, lam in anchors], device, dtype)
        if self._own and self._key == key:
            return
        self.restore()
        if anchors and self._key != key:
            self._sum(anchors, device, dtype)
            self._key = key
        if anchors:
            self._own = [parameter.data for parameter in self._parameters]
            for parameter, total in zip(self._parameters, self._sums):
                parameter.data = total

    def restore(self, *_: Any) -> None:
        """Give the reference its own weights back, where it has been moved to meanwhile."""
        for parameter, own in zip(self._parameters, self._own):
            parameter.data = own.to(parameter.device, parameter.dtype)
        self._own = []

    def _sum(
        self,
        anchors: Sequence[tuple[Adapter | FullAnchor, float]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """theta_ref + sum lam_i (theta_i - theta_ref) of each parameter that moves; kept until a lam, the device or precision changes."""
        self._key, self._sums = None, []  # let the old sum go before the new one is made
        ours = base_parameters(self.denoiser)
        sums = {name: p.data for name, p in ours.items()}
        full = [
            (dict(a.network(device, dtype).named_parameters()), lam)
            for a, lam in anchors
            if isinstance(a, FullAnchor)
        ]
        if full:
            weights = [1 - sum(lam for _, lam in full), *(lam for _, lam in full)]
            sums = {
                name: weighted_sum([p, *(theirs[name].data for theirs, _ in full)], weights)
                for name, p in sums.items()
            }
        for adapter, lam in anchors:
            if isinstance(adapter, Adapter):
                for name, delta in adapter.deltas():
                    sums[name] = summed([sums[name].float(), delta.float()], [1.0, lam]).to(
                        sums[name].dtype
                    )
        moved = [
            name
            for name, p in ours.items()
            if sums[name] is not p.data and sums[name].data_ptr() != p.data_ptr()
        ]
        self._parameters, self._sums = (
            [ours[name] for name in moved],
            [sums[name] for name in moved],
        )


def is_zero(weight: Strength) -> bool:
    """Whether a weight is 0 everywhere."""
    return not bool(weight.any()) if isinstance(weight, Tensor) else weight == 0


def weighted_sum(tensors: Sequence[Tensor | None], weights: Sequence[Strength]) -> Tensor:
    """sum w_i t_i in at least single precision, rounded once; a tensor that has all the weight is returned as it is."""
    parts = [
        (tensor, weight)
        for tensor, weight in zip(tensors, weights)
        if tensor is not None and not is_zero(weight)
    ]
    if len(parts) == 1 and not isinstance(parts[0][1], Tensor):
        return parts[0][0]
    dtype = parts[0][0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    return summed([tensor.to(wide) for tensor, _ in parts], [weight for _, weight in parts]).to(
        dtype
    )


def summed(tensors: Sequence[Tensor], weights: Sequence[Strength]) -> Tensor:
    """sum w_i t_i."""
    total = weights[0] * tensors[0]
    for tensor, weight in zip(tensors[1:], weights[1:]):
        total = total + weight * tensor
    return total


def _extrapolated(seen: Sequence[tuple[int, float, Tensor]], time: float) -> Tensor:
    """D at a fraction of time, on the line through the last two that were evaluated; the last one while there is no other."""
    _, last, difference = seen[-1]
    if len(seen) == 1:
        return difference
    _, before, earlier = seen[0]
    return difference + (time - last) / (last - before) * (difference - earlier)
