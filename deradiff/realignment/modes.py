"""The modes of `realign`: three ways to evaluate a realigned denoiser.

What each mode costs and takes stands in `deradiff.realignment.mode_specs`.

Shapes: a denoiser's output is (rows, ...). Models are numbered 0 for the reference and i for the
i-th anchor; lams has one entry for each anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from deradiff.method.lambdas import Strength
from deradiff.models.family import unwrapped
from deradiff.realignment.adapters import Adapter
from deradiff.realignment.clock import Clock
from deradiff.realignment.dial import LimitLams
from deradiff.realignment.mode_specs import EXACT, REUSE, WEIGHTS
from deradiff.realignment.networks import (
    Call,
    FullAnchor,
    Networks,
    base_parameters,
    with_tensor,
)


@dataclass
class Mixed:
    """A realigned output, and what is known of it.

    Attributes:
        output: as the denoiser returns it.
        shift: how far it is from the reference's output; None where that is not known.
        differences: of each anchor's output from the reference's; None where not known.
        lams: the lambdas that were used, possibly lowered by a trust region.
    """

    output: Any
    shift: Tensor | None
    differences: list[Tensor] | None = None
    lams: Sequence[Strength] = ()


@dataclass(frozen=True)
class ModeParts:
    """What a mode is made from.

    Attributes:
        denoiser: the reference network as the pipeline holds it.
        networks: reference and anchors.
        clock: the pipeline's position in the chain.
        limit_lams: the trust region.
        every: of mode `reuse`.
        with_reference: also evaluate the reference where the mode does not need it.
    """

    denoiser: nn.Module
    networks: Networks
    clock: Clock
    limit_lams: LimitLams
    every: int
    with_reference: bool


class Mode(Protocol):
    """A way to evaluate a realigned denoiser."""

    def __call__(self, call: Call, lams: Sequence[Strength]) -> Mixed:
        """Evaluate the networks and mix.

        Args:
            call: the evaluation that the pipeline asks for.
            lams: numbers, or tensors that broadcast to the output.
        """
        ...

    def enter(self, stack: ExitStack) -> None:
        """Called once before the first evaluation, to register what must be undone at the end."""
        ...


class Exact:
    """out_ref + sum lam_i (out_i - out_ref), each network on the same input.

    For every sampler whose step is linear in the output this is the closed form of the mixture
    (docs/method.md). A network of weight 0 is not evaluated.
    """

    def __init__(
        self, networks: Networks, clock: Clock, limit_lams: LimitLams, with_reference: bool
    ) -> None:
        self.networks = networks
        self.clock = clock
        self.limit_lams = limit_lams
        self.with_reference = with_reference

    @classmethod
    def from_parts(cls, parts: ModeParts) -> Exact:
        """The mode of a `realign` context."""
        return cls(parts.networks, parts.clock, parts.limit_lams, parts.with_reference)

    def enter(self, stack: ExitStack) -> None:
        """Nothing to undo."""

    def __call__(self, call: Call, lams: Sequence[Strength]) -> Mixed:
        """Two evaluations, or one where a weight is 0."""
        # One evaluation of each network that has a weight
        reference_weight = 1 - sum(lams)
        wants_reference = self.with_reference or not is_zero(reference_weight)
        wants_anchors = [not is_zero(lam) for lam in lams]
        wanted = [wants_reference, *wants_anchors]
        outputs = self.networks(call, wanted, self.clock.is_first_evaluation)
        tensors = [None if output is None else output[0] for output in outputs]
        if tensors[0] is None:
            mixed = weighted_sum(tensors, [reference_weight, *lams])
            return Mixed(with_tensor(_first(outputs), mixed), None, None, lams)

        # The differences from the reference are known, so a trust region can bound them
        differences = _differences(tensors)
        lams = self.limit_lams(lams, differences)
        mixed = weighted_sum(tensors, [1 - sum(lams), *lams])
        shift = scaled_sum(differences, lams)
        return Mixed(with_tensor(_first(outputs), mixed), shift, differences, lams)


class Evaluated(NamedTuple):
    """An evaluated difference of mode `reuse`."""

    index: int
    fraction: float
    difference: Tensor


class Reuse:
    """out + (lam or lam - 1) D, where D = out_anchor - out_ref is evaluated every k-th step.

    In between D is extrapolated linearly in time, and only the network of the larger weight is
    evaluated, so that D's error counts by min(lam, |1 - lam|): 1 + 1/k evaluations.
    """

    def __init__(self, networks: Networks, clock: Clock, limit_lams: LimitLams, every: int) -> None:
        self.networks = networks
        self.clock = clock
        self.limit_lams = limit_lams
        self.every = every
        # The last two, for each evaluation within a step
        self._evaluated: dict[int, list[Evaluated]] = {}

    @classmethod
    def from_parts(cls, parts: ModeParts) -> Reuse:
        """The mode of a `realign` context."""
        return cls(parts.networks, parts.clock, parts.limit_lams, parts.every)

    def enter(self, stack: ExitStack) -> None:
        """Nothing to undo."""

    def __call__(self, call: Call, lams: Sequence[Strength]) -> Mixed:
        """One evaluation, or two at every k-th step."""
        (lam,) = lams
        clock = self.clock
        if clock.is_new_call or clock.index is None:
            self._evaluated = {}
        evaluated = self._evaluated.setdefault(clock.evaluation, [])

        # Which networks: both at every k-th step, otherwise the one of the larger weight
        is_number = not isinstance(lam, Tensor)
        anchor_leads = is_number and lam > 0.5
        mixes = not is_number or lam not in (0, 1)
        both = mixes and self._is_due(evaluated)
        wanted = [both or not anchor_leads, both or anchor_leads]
        outputs = self.networks(call, wanted, clock.is_first_evaluation)
        leading = outputs[1] if anchor_leads else outputs[0]
        if not mixes:
            shift = None if anchor_leads else torch.zeros_like(leading[0])
            return Mixed(leading, shift)

        # The difference: fresh, or on the line through the last two
        if both:
            difference = outputs[1][0].float() - outputs[0][0].float()
            newest = Evaluated(clock.index or 0, clock.fraction, difference)
            evaluated[:] = [*evaluated[-1:], newest]
        else:
            difference = _extrapolated(evaluated, clock.fraction)

        # Mix
        (lam,) = self.limit_lams([lam], [difference])
        if both:
            mixed = weighted_sum([output[0] for output in outputs], [1 - lam, lam])
        else:
            weight = lam - 1 if anchor_leads else lam
            base = leading[0]
            mixed = (base.float() + weight * difference).to(base.dtype)
        return Mixed(with_tensor(_first(outputs), mixed), lam * difference, [difference])

    def _is_due(self, evaluated: Sequence[Evaluated]) -> bool:
        """Whether both networks are to be evaluated at this step."""
        if self.clock.index is None or not evaluated:
            return True
        return self.clock.index - evaluated[-1].index >= self.every


def _extrapolated(evaluated: Sequence[Evaluated], fraction: float) -> Tensor:
    """D at a fraction of time, on the line through the last two; the last one if it is alone."""
    last = evaluated[-1]
    if len(evaluated) == 1:
        return last.difference
    before = evaluated[0]
    slope = (fraction - last.fraction) / (last.fraction - before.fraction)
    return last.difference + slope * (last.difference - before.difference)


class Weights:
    """One network at theta_ref + sum lam_i (theta_i - theta_ref): mixing's first order.

    A LoRA's delta is scaled by lam_i. The summed weights stay in place from a chain's first step to
    its last; `restore` puts the reference's own back, and is called then, when somebody saves, and
    when the context is left. A LoRA alone at lam = 1 acts beside the weights, as in the stock
    pipeline, bit for bit.
    """

    def __init__(
        self, denoiser: nn.Module, networks: Networks, clock: Clock, with_reference: bool
    ) -> None:
        self.denoiser = denoiser
        self.networks = networks
        self.clock = clock
        self.with_reference = with_reference
        self._key: Any = None  # what the sums were made from
        self._parameters: list[nn.Parameter] = []  # those that the sums replace
        self._sums: list[Tensor] = []
        self._own: list[Tensor] = []  # the reference's weights, while the sums are in place

    @classmethod
    def from_parts(cls, parts: ModeParts) -> Weights:
        """The mode of a `realign` context."""
        denoiser = unwrapped(parts.denoiser)
        return cls(denoiser, parts.networks, parts.clock, parts.with_reference)

    def enter(self, stack: ExitStack) -> None:
        """The reference's own weights come back at the end, and before somebody saves."""
        hook = self.denoiser.register_state_dict_pre_hook(self.restore)
        stack.callback(hook.remove)
        stack.callback(self.restore)

    def __call__(self, call: Call, lams: Sequence[Strength]) -> Mixed:
        """One evaluation; two where the reference is wanted for the path KL."""
        if any(isinstance(lam, Tensor) for lam in lams):
            raise ValueError(
                "mode='weights' has one set of weights, and so one lam, for all images and "
                "regions: use mode='exact'"
            )
        numbers = [float(lam) for lam in lams]
        if not any(numbers):
            self.restore()
            (output,) = self.networks(call, [True])
            return Mixed(output, torch.zeros_like(output[0]))

        output = self._evaluate_sum(call, numbers)
        if not self.with_reference:
            return Mixed(output, None)
        self.restore()
        (reference,) = self.networks(call, [True])
        return Mixed(output, output[0].float() - reference[0].float())

    def _evaluate_sum(self, call: Call, lams: Sequence[float]) -> Any:
        """The output of the network with summed weights."""
        anchors = [(anchor, lam) for anchor, lam in zip(self.networks.anchors, lams) if lam != 0]
        beside = [anchor for anchor, lam in anchors if _acts_beside(anchor, lam, len(anchors))]
        summed = [(anchor, lam) for anchor, lam in anchors if anchor not in beside]
        self._put_in_place(summed, call.x.device, call.x.dtype)
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
            if self.clock.index is None or self.clock.is_last_step:
                self.restore()

    def _put_in_place(
        self,
        anchors: Sequence[tuple[Adapter | FullAnchor, float]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Replace the reference's weights by the sums, made anew only if something changed."""
        key = ([lam for _, lam in anchors], device, dtype)
        if self._own and self._key == key:
            return
        self.restore()
        if not anchors:
            return
        if self._key != key:
            self._make_sums(anchors, device, dtype)
            self._key = key
        self._own = [parameter.data for parameter in self._parameters]
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            parameter.data = total

    def restore(self, *_: Any) -> None:
        """Give the reference its own weights back, on the device where it is now."""
        for parameter, own in zip(self._parameters, self._own):
            parameter.data = own.to(parameter.device, parameter.dtype)
        self._own = []

    def _make_sums(
        self,
        anchors: Sequence[tuple[Adapter | FullAnchor, float]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """theta_ref + sum lam_i (theta_i - theta_ref) of each parameter that moves."""
        # Let the old sums go before new ones need memory
        self._key = None
        self._sums = []

        # Full anchors: a weighted sum of whole networks
        own = base_parameters(self.denoiser)
        sums = {name: parameter.data for name, parameter in own.items()}
        full = [(anchor, lam) for anchor, lam in anchors if isinstance(anchor, FullAnchor)]
        if full:
            weights = [1 - sum(lam for _, lam in full), *(lam for _, lam in full)]
            networks = [
                dict(anchor.network(device, dtype).named_parameters()) for anchor, _ in full
            ]
            for name, parameter in sums.items():
                theirs = [network[name].data for network in networks]
                sums[name] = weighted_sum([parameter, *theirs], weights)

        # LoRA anchors: their deltas on top
        for anchor, lam in anchors:
            if isinstance(anchor, Adapter):
                for name, delta in anchor.deltas():
                    total = scaled_sum([sums[name].float(), delta.float()], [1.0, lam])
                    sums[name] = total.to(sums[name].dtype)

        # Only parameters that moved are exchanged
        moved = []
        for name, parameter in own.items():
            is_same = sums[name] is parameter.data
            if not is_same and sums[name].data_ptr() != parameter.data_ptr():
                moved.append(name)
        self._parameters = [own[name] for name in moved]
        self._sums = [sums[name] for name in moved]


def _acts_beside(anchor: Adapter | FullAnchor, lam: float, anchors: int) -> bool:
    """Whether a LoRA acts beside the weights instead of in them.

    A DoRA has no single matrix to add; a LoRA alone at lam = 1 is then the stock pipeline.
    """
    if not isinstance(anchor, Adapter):
        return False
    return anchor.is_variant or (anchors == 1 and lam == 1)


MODE_TYPES = {EXACT.name: Exact, REUSE.name: Reuse, WEIGHTS.name: Weights}
"""The class of each mode of `mode_specs.MODES`."""


def is_zero(weight: Strength) -> bool:
    """Whether a weight is 0 everywhere."""
    if isinstance(weight, Tensor):
        return not bool(weight.any())
    return weight == 0


def weighted_sum(tensors: Sequence[Tensor | None], weights: Sequence[Strength]) -> Tensor:
    """sum w_i t_i in at least single precision, rounded once.

    A tensor that has all the weight is returned as it is. None stands for a tensor of weight 0.
    """
    parts = []
    for tensor, weight in zip(tensors, weights, strict=True):
        if tensor is not None and not is_zero(weight):
            parts.append((tensor, weight))
    if len(parts) == 1 and not isinstance(parts[0][1], Tensor):
        return parts[0][0]
    dtype = parts[0][0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = scaled_sum([tensor.to(wide) for tensor, _ in parts], [weight for _, weight in parts])
    return total.to(dtype)


def scaled_sum(tensors: Sequence[Tensor], weights: Sequence[Strength]) -> Tensor:
    """sum w_i t_i in the tensors' own precision."""
    total = weights[0] * tensors[0]
    for tensor, weight in zip(tensors[1:], weights[1:]):
        total = total + weight * tensor
    return total


def _differences(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Each anchor's output minus the reference's; 0 for an anchor that was not evaluated."""
    reference = tensors[0]
    assert reference is not None
    differences = []
    for tensor in tensors[1:]:
        if tensor is None:
            differences.append(torch.zeros_like(reference))
        else:
            differences.append(tensor.float() - reference.float())
    return differences


def _first(outputs: Sequence[Any]) -> Any:
    """The first output that was evaluated: its kind is the mixture's."""
    return next(output for output in outputs if output is not None)
