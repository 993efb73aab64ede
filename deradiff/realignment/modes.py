"""The modes of `realign`: ways to evaluate a realigned denoiser. `deradiff.realignment.registry`
lists them.

Shapes: rows of the denoiser's batch; outputs and their differences are (rows, C, H, W), or
(rows, L, C) in transformers that take packed latents. A weight is a number or a tensor that
broadcasts to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deradiff.method.lambdas import Strength
from deradiff.realignment.adapters import Adapter
from deradiff.realignment.clock import Clock
from deradiff.realignment.networks import Call, FullAnchor, Networks, base_parameters, with_tensor

LimitLams = Callable[[Sequence[Strength], Sequence[Tensor]], list[Strength]]
"""Lowers lams to a trust region, by each anchor's difference from the reference (rows, ...)."""

WeightedAnchor = tuple[Adapter | FullAnchor, float]
"""An anchor and its lam."""


@dataclass
class Mixed:
    """A realigned output, and what is known about it.

    Attributes:
        output: the network's output, a tuple or an output of diffusers.
        shift: the output minus the reference's; None: unknown.
        differences: each anchor's output minus the reference's; None: unknown.
        lams: the weight of each difference, after a trust region may have lowered it.
    """

    output: Any
    shift: Tensor | None
    differences: list[Tensor] | None = None
    lams: Sequence[Strength] = ()


@dataclass(frozen=True)
class ModeParts:
    """What `realign` offers to a mode.

    Attributes:
        denoiser: the reference network, without wrappers.
        networks: the reference and its anchors.
        clock: the step that the pipeline is at.
        limit_lams: lowers lams where the user gave a trust region.
        path_kl: whether to evaluate the reference even where the mode does not need it.
        every: steps from one evaluation of the difference to the next, for mode reuse.
    """

    denoiser: Any
    networks: Networks
    clock: Clock
    limit_lams: LimitLams
    path_kl: bool
    every: int


class Mode(ABC):
    """A way to evaluate the realigned denoiser.

    Args:
        parts: what it is made from.
    """

    def __init__(self, parts: ModeParts) -> None:
        self.networks = parts.networks
        self.clock = parts.clock

    @abstractmethod
    def evaluate(self, call: Call, lams: Sequence[Strength]) -> Mixed:
        """The realigned output.

        Args:
            call: the evaluation that the pipeline asks for.
            lams: the weight of each anchor.
        """

    def enter(self, stack: ExitStack) -> None:
        """Note on `stack` what has to be undone when the context of `realign` is left."""
        return


class Exact(Mode):
    """Mixes the outputs of all networks: out_ref + sum lam_i (out_i - out_ref).

    For a sampler whose step is linear in the output this is the geometric mixture of the step's
    distributions (DeRaDiff, Theorem 1 and Algorithm 1). A network of weight 0 is not evaluated.
    """

    def __init__(self, parts: ModeParts) -> None:
        super().__init__(parts)
        self.limit_lams = parts.limit_lams
        self.path_kl = parts.path_kl

    def evaluate(self, call: Call, lams: Sequence[Strength]) -> Mixed:
        """Evaluate every network that has a weight, and mix."""
        # The reference has the weight that the anchors leave.
        needs_reference = self.path_kl or not is_zero(1 - sum(lams))
        wanted = [needs_reference, *(not is_zero(lam) for lam in lams)]
        outputs = self.networks.evaluate(call, wanted, self.clock.is_first_evaluation)
        tensors = [None if output is None else output[0] for output in outputs]

        # A trust region lowers lams by what the anchors change.
        differences = _differences(tensors)
        if differences is not None:
            lams = self.limit_lams(lams, differences)

        mixed = weighted_sum(tensors, [1 - sum(lams), *lams])
        shift = None if differences is None else linear_combination(differences, lams)
        return Mixed(with_tensor(_first_known(outputs), mixed), shift, differences, lams)


class _Evaluated(NamedTuple):
    """A difference of anchor and reference, with the step and the fraction of time it is from."""

    step: int
    fraction: float
    difference: Tensor


class Reuse(Mode):
    """Evaluates D = out_anchor - out_ref at every k-th step, and extrapolates it linearly between.

    Between, only the network of the larger weight is evaluated, and the output is that network's
    plus its share of D: lam D on the reference, or (lam - 1) D on the anchor. So an error of D
    counts by min(lam, |1 - lam|). The cost is 1 + 1/k evaluations a step.
    """

    def __init__(self, parts: ModeParts) -> None:
        super().__init__(parts)
        self.limit_lams = parts.limit_lams
        self.every = parts.every
        # The last two that were evaluated, for each of the evaluations that a step makes.
        self._history: dict[int, list[_Evaluated]] = {}

    def evaluate(self, call: Call, lams: Sequence[Strength]) -> Mixed:
        """Evaluate one network, or both where the difference is due."""
        (lam,) = lams
        history = self._history_now()

        # Lambda 0 and 1, as numbers, are one of the two networks.
        base_is_anchor = not isinstance(lam, Tensor) and lam > 0.5
        is_one_network = not isinstance(lam, Tensor) and lam in (0, 1)
        evaluates_both = self._is_due(history) and not is_one_network
        wanted = [evaluates_both or not base_is_anchor, evaluates_both or base_is_anchor]
        outputs = self.networks.evaluate(call, wanted, self.clock.is_first_evaluation)
        reference, anchor = outputs
        base = anchor if base_is_anchor else reference
        if is_one_network:
            return Mixed(base, None if base_is_anchor else torch.zeros_like(base[0]))

        # The difference, as of now or on the line through the last two.
        if evaluates_both:
            difference = anchor[0].float() - reference[0].float()
            now = _Evaluated(self.clock.index or 0, self.clock.fraction, difference)
            history[:] = [*history[-1:], now]
        else:
            difference = _extrapolated(history, self.clock.fraction)
        (lam,) = self.limit_lams([lam], [difference])

        if evaluates_both:
            mixed = weighted_sum([reference[0], anchor[0]], [1 - lam, lam])
        else:
            weight = lam - 1 if base_is_anchor else lam
            mixed = (base[0].float() + weight * difference).to(base[0].dtype)
        output = with_tensor(_first_known(outputs), mixed)
        return Mixed(output, lam * difference, [difference])

    def _history_now(self) -> list[_Evaluated]:
        """The history of this evaluation within its step; empty in a new call, and outside one."""
        if self.clock.is_new_call or self.clock.index is None:
            self._history = {}
        return self._history.setdefault(self.clock.evaluation, [])

    def _is_due(self, history: Sequence[_Evaluated]) -> bool:
        """Whether the difference has to be evaluated at this step."""
        if self.clock.index is None or not history:
            return True
        return self.clock.index - history[-1].step >= self.every


class Weights(Mode):
    """One network at theta_ref + sum lam_i (theta_i - theta_ref): the first order of mixing.

    Of a LoRA, theta_i - theta_ref is its delta. The summed weights stay in place from a chain's
    first step to its last. `restore` puts the reference's own weights back: after the last step,
    when somebody saves, and when the context is left. A single LoRA at lam = 1 acts beside the
    weights, as it does in the stock pipeline, bit for bit.
    """

    def __init__(self, parts: ModeParts) -> None:
        super().__init__(parts)
        self.denoiser = parts.denoiser
        self.path_kl = parts.path_kl
        # The sums, and the lams, device and precision that they were computed for.
        self._key: Any = None
        self._parameters: list[nn.Parameter] = []
        self._sums: list[Tensor] = []
        # The reference's own weights, while the sums are in place.
        self._own: list[Tensor] = []

    def enter(self, stack: ExitStack) -> None:
        """Have the reference's weights restored before they are saved, and at the end."""
        hook = self.denoiser.register_state_dict_pre_hook(self.restore)
        stack.callback(hook.remove)
        stack.callback(self.restore)

    def evaluate(self, call: Call, lams: Sequence[Strength]) -> Mixed:
        """Evaluate one network, and the reference too where the path KL needs it.

        Raises:
            ValueError: for a lam that differs between images or regions.
        """
        if any(isinstance(lam, Tensor) for lam in lams):
            raise ValueError(
                "mode='weights' has one set of weights, and so one lam, for all images and "
                "regions: use mode='exact'"
            )
        numbers = [float(lam) for lam in lams]
        if not any(numbers):
            output = self._reference_output(call)
            return Mixed(output, torch.zeros_like(output[0]))
        output = self._output_at(call, numbers)
        if not self.path_kl:
            return Mixed(output, None)
        reference = self._reference_output(call)
        return Mixed(output, output[0].float() - reference[0].float())

    def restore(self, *_: Any) -> None:
        """Give the reference its own weights back, where it has been moved to in the meantime."""
        for parameter, own in zip(self._parameters, self._own):
            parameter.data = own.to(parameter.device, parameter.dtype)
        self._own = []

    def _reference_output(self, call: Call) -> Any:
        self.restore()
        return self.networks.evaluate(call, [True])[0]

    def _output_at(self, call: Call, lams: Sequence[float]) -> Any:
        """The network's output at lams that are not all 0."""
        anchors = [(anchor, lam) for anchor, lam in zip(self.networks.anchors, lams) if lam != 0]

        # DoRA is not a sum of weights, and a LoRA alone at lam = 1 is to be the stock pipeline's.
        beside: list[tuple[Adapter, float]] = []
        summed: list[WeightedAnchor] = []
        is_single = len(anchors) == 1
        for anchor, lam in anchors:
            if isinstance(anchor, Adapter) and (anchor.is_variant or (is_single and lam == 1)):
                beside.append((anchor, lam))
            else:
                summed.append((anchor, lam))

        self._put_in_place(summed, call.x.device, call.x.dtype)
        try:
            with ExitStack() as stack:
                for adapter, lam in beside:
                    stack.enter_context(adapter.active(lam))
                return self.networks.evaluate(call, [True])[0]
        except BaseException:
            self.restore()
            raise
        finally:
            if self.clock.index is None or self.clock.is_last_step:
                self.restore()

    def _put_in_place(
        self, anchors: Sequence[WeightedAnchor], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Make the sums the network's weights, unless they are already."""
        key = ([lam for _, lam in anchors], device, dtype)
        if self._own and self._key == key:
            return
        self.restore()
        if not anchors:
            return
        if self._key != key:
            self._compute_sums(anchors, device, dtype)
            self._key = key
        self._own = [parameter.data for parameter in self._parameters]
        for parameter, total in zip(self._parameters, self._sums):
            parameter.data = total

    def _compute_sums(
        self, anchors: Sequence[WeightedAnchor], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Compute the weights that differ from the reference's own."""
        # The old sums go first: there may be no memory for both.
        self._key = None
        self._sums = []

        parameters = base_parameters(self.denoiser)
        sums = {name: parameter.data for name, parameter in parameters.items()}

        # Full anchors: theta_ref + sum lam_i (theta_i - theta_ref).
        full: list[dict[str, nn.Parameter]] = []
        full_lams: list[float] = []
        for anchor, lam in anchors:
            if isinstance(anchor, FullAnchor):
                full.append(dict(anchor.network(device, dtype).named_parameters()))
                full_lams.append(lam)
        if full:
            weights = [1 - sum(full_lams), *full_lams]
            for name, own in sums.items():
                sums[name] = weighted_sum([own, *(theirs[name].data for theirs in full)], weights)

        # LoRA anchors: plus lam_i times the delta of each layer.
        for anchor, lam in anchors:
            if isinstance(anchor, Adapter):
                for name, delta in anchor.deltas():
                    total = linear_combination([sums[name].float(), delta.float()], [1.0, lam])
                    sums[name] = total.to(sums[name].dtype)

        self._parameters = []
        for name, parameter in parameters.items():
            if sums[name].data_ptr() != parameter.data_ptr():
                self._parameters.append(parameter)
                self._sums.append(sums[name])


def is_zero(weight: Strength) -> bool:
    """Whether a weight is 0 everywhere."""
    if isinstance(weight, Tensor):
        return not bool(weight.any())
    return weight == 0


def weighted_sum(tensors: Sequence[Tensor | None], weights: Sequence[Strength]) -> Tensor:
    """The sum of w_i t_i in at least single precision, rounded once.

    A tensor that has all the weight is returned as it is, bit for bit.

    Args:
        tensors: of one shape and precision; None where the weight is 0.
        weights: of the tensors; they sum to 1.
    """
    parts = []
    for tensor, weight in zip(tensors, weights):
        if tensor is not None and not is_zero(weight):
            parts.append((tensor, weight))
    first, first_weight = parts[0]
    if len(parts) == 1 and not isinstance(first_weight, Tensor):
        return first
    wide = torch.promote_types(first.dtype, torch.float32)
    total = linear_combination([tensor.to(wide) for tensor, _ in parts], [w for _, w in parts])
    return total.to(first.dtype)


def linear_combination(tensors: Sequence[Tensor], weights: Sequence[Strength]) -> Tensor:
    """The sum of w_i t_i, in the order given."""
    total = weights[0] * tensors[0]
    for tensor, weight in zip(tensors[1:], weights[1:]):
        total = total + weight * tensor
    return total


def _differences(tensors: Sequence[Tensor | None]) -> list[Tensor] | None:
    """Each anchor's output minus the reference's, 0 where it was not evaluated; None: unknown."""
    reference, *anchors = tensors
    if reference is None:
        return None
    differences = []
    for anchor in anchors:
        if anchor is None:
            differences.append(torch.zeros_like(reference))
        else:
            differences.append(anchor.float() - reference.float())
    return differences


def _first_known(outputs: Sequence[Any]) -> Any:
    return next(output for output in outputs if output is not None)


def _extrapolated(history: Sequence[_Evaluated], fraction: float) -> Tensor:
    """D at a fraction of time, on the line through the last two; the last one where it is alone."""
    last = history[-1]
    if len(history) == 1:
        return last.difference
    before = history[0]
    slope = (fraction - last.fraction) / (last.fraction - before.fraction)
    return last.difference + slope * (last.difference - before.difference)
