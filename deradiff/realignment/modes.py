"""The modes of `realign`: ways to evaluate a realigned denoiser. `deradiff.realignment.registry`
lists them.

A network's output has one or more tensors, its *leaves*, and each of them is mixed.

Shapes: rows of the denoiser's batch; a leaf is (rows, C, H, W), (rows, L, C) in transformers that
take packed latents, or one row of these where a network returns a list. A weight is a number or a
tensor that broadcasts to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deradiff.method.branches import BranchStrengths
from deradiff.method.lambdas import Strength
from deradiff.realignment.adapters import Adapter
from deradiff.realignment.branches import MAX_BLOCKS, block_parts, blocks_in
from deradiff.realignment.cache_states import REFERENCE
from deradiff.realignment.carriers import LostTrack, carry
from deradiff.realignment.clock import Clock
from deradiff.realignment.networks import Call, Networks, Output
from deradiff.realignment.rows import lam_of_row, lam_of_rows
from deradiff.realignment.summed_weights import (
    SummedWeights,
    WeightedAnchor,
    asks_for_scale,
)
from deradiff.realignment.sums import is_mixable, is_zero, linear_combination, weighted_sum

GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Its multiples, modulo 1, fill the interval evenly."""

ROUNDING = 1e-9
"""By so much lambdas that add up to 1 may be off."""


class Companions(NamedTuple):
    """What the models predicted where a realigned output has one of its leaves, in full precision.

    Attributes:
        reference: the reference's output; None: unknown.
        mixture: the realigned output before it was rounded to its precision; None: unknown.
        anchors: the output of each anchor; None: unknown.
        blocks: what `deradiff.realignment.branches.block_parts` made, where lambda differs between
            branches of guidance.
    """

    reference: Tensor | None
    mixture: Tensor | None
    anchors: tuple[Tensor | None, ...]
    blocks: tuple[Tensor | None, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Tensor | None], anchors: int) -> Companions:
        """What `carried` made of them, after the guidance.

        Args:
            parts: the companions in their order.
            anchors: the number of anchors that are carried.
        """
        end = 2 + anchors
        return cls(parts[0], parts[1], tuple(parts[2:end]), tuple(parts[end:]))


@dataclass
class Mixed:
    """A realigned output, and what is known about it.

    Attributes:
        output: the network's output.
        companions: of each leaf; None for a leaf that is no tensor of numbers.
        blocks: of rows that are branches of guidance; 0: not counted.
    """

    output: Output
    companions: list[Companions | None] = field(default_factory=list)
    blocks: int = 0


@dataclass(frozen=True)
class ModeParts:
    """What `realign` offers to a mode.

    Attributes:
        denoiser: the reference network, without wrappers.
        networks: the reference and its anchors.
        clock: the step that the pipeline is at.
        patch_size: side of the patches of latents that the network returns.
        path_kl: whether to evaluate the reference even where the mode does not need it.
        every: steps from one evaluation of the difference to the next, for mode reuse.
    """

    denoiser: Any
    networks: Networks
    clock: Clock
    patch_size: int
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
        self.patch_size = parts.patch_size

    @abstractmethod
    def evaluate(self, call: Call, lams: Sequence[Strength]) -> Mixed:
        """The realigned output.

        Args:
            call: the evaluation that the pipeline asks for.
            lams: the strength of each anchor at this step.
        """

    def _check_no_caches(self, mode: str) -> None:
        """Raise ValueError where a cache of diffusers counts evaluations that a mode leaves out."""
        if self.networks.caches.has_caches:
            raise ValueError(
                f"mode={mode!r} leaves evaluations out, which a cache of diffusers on the network "
                "counts: use mode='exact', or switch off the cache (disable_cache)"
            )

    def weights(self, lams: Sequence[Strength], leaf: Tensor, position: int, call: Call) -> Any:
        """Lams in shapes that broadcast to a leaf.

        Args:
            lams: the strength of each anchor.
            leaf: of a network's output.
            position: of the leaf in the output.
            call: the evaluation.
        """
        if isinstance(call.x, list):
            return [lam_of_row(lam, position) for lam in lams]
        return [lam_of_rows(lam, leaf, self.patch_size) for lam in lams]


class Exact(Mode):
    """Mixes the outputs of all networks: out_ref + sum lam_i (out_i - out_ref).

    For a sampler whose step is linear in the output this is the geometric mixture of the step's
    distributions (DeRaDiff, Theorem 1 and Algorithm 1). A network of weight 0 is not evaluated.
    """

    def __init__(self, parts: ModeParts) -> None:
        super().__init__(parts)
        self.path_kl = parts.path_kl
        # The blocks of rows that earlier evaluations of this step had.
        self._blocks_before = 0

    def evaluate(self, call: Call, lams: Sequence[Strength]) -> Mixed:
        """Evaluate every network that has a weight, and mix."""
        if any(isinstance(lam, BranchStrengths) for lam in lams):
            return self._evaluate_branches(call, lams)

        # The reference has the weight that the anchors leave.
        needs_reference = self.path_kl or not is_zero(1 - sum(lams))
        wanted = [needs_reference, *(not is_zero(lam) for lam in lams)]
        outputs = self.networks.evaluate(
            call, wanted, self.clock.is_first_evaluation, as_stock=any(map(has_one, lams))
        )
        return self._mix(call, outputs, lams)

    def _mix(self, call: Call, outputs: Sequence[Output | None], lams: Sequence[Strength]) -> Mixed:
        """Mix each leaf of the outputs."""
        first = _first_known(outputs)
        mixed = Mixed(Output(list(first.leaves), first.structure))
        for position, leaf in enumerate(first.leaves):
            tensors = [None if output is None else output.leaves[position] for output in outputs]
            if not is_mixable(leaf):
                mixed.companions.append(None)
                continue
            own_lams = self.weights(lams, leaf, position, call)
            own_weights = [1 - sum(own_lams), *own_lams]
            mixed.output.leaves[position] = weighted_sum(tensors, own_weights)
            mixed.companions.append(_companions(tensors, own_weights))
        return mixed

    def _evaluate_branches(self, call: Call, lams: Sequence[Any]) -> Mixed:
        """All networks, with what tells the branches of guidance apart.

        The output itself has the lambda of the conditional branch in all rows. The scheduler's step
        puts the right mixture in its place (`deradiff.realignment.guided_steps`).
        """
        # Which blocks of the step are these?
        count = blocks_in(call.x)
        if self.clock.evaluation == 0:
            self._blocks_before = 0
        block = range(self._blocks_before, self._blocks_before + count)
        self._blocks_before += count
        if block.stop > MAX_BLOCKS:
            raise ValueError(
                f"a lam for each branch is for guidance of up to {MAX_BLOCKS} branches: give one "
                "lam for all"
            )

        plain_lams = []
        for lam in lams:
            plain_lams.append(lam.conditional if isinstance(lam, BranchStrengths) else lam)
        wanted = [True] * (len(lams) + 1)
        outputs = self.networks.evaluate(
            call, wanted, self.clock.is_first_evaluation, as_stock=any(map(has_one, lams))
        )
        mixed = self._mix(call, outputs, plain_lams)
        mixed.blocks = count
        owners = [row // (call.rows // count) for row in range(call.rows)]
        for position, companions in enumerate(mixed.companions):
            if companions is None:
                continue
            reference: Any = companions.reference
            anchors: Any = companions.anchors
            if isinstance(call.x, list):
                own = [owners[position]]
                parts = block_parts(reference[None], [a[None] for a in anchors], block, own)
                parts = [part[0] for part in parts]
            else:
                parts = block_parts(reference, anchors, block, owners)
            mixed.companions[position] = companions._replace(blocks=tuple(parts))
        return mixed


class _Evaluated(NamedTuple):
    """The differences of anchor and reference, by leaf, with the step and fraction of time."""

    step: int
    fraction: float
    differences: list[Tensor | None]


class Reuse(Mode):
    """Evaluates D = out_anchor - out_ref at every k-th step, and extrapolates it linearly between.

    Between, only the network of the larger weight is evaluated, and the output is that network's
    plus its share of D: lam D on the reference, or (lam - 1) D on the anchor. So an error of D
    counts by min(lam, |1 - lam|). The cost is 1 + 1/k evaluations a step.
    """

    def __init__(self, parts: ModeParts) -> None:
        super().__init__(parts)
        self.every = parts.every
        # The last two that were evaluated, for each of the evaluations that a step makes.
        self._history: dict[int, list[_Evaluated]] = {}
        # The rows of each of these evaluations, and the chain that they are of.
        self._rows: dict[int, int] = {}
        self._chain = 0

    def evaluate(self, call: Call, lams: Sequence[Strength]) -> Mixed:
        """Evaluate one network, or both where the difference is due.

        Raises:
            ValueError: where a cache of diffusers counts the network's evaluations.
        """
        self._check_no_caches("reuse")
        (lam,) = lams
        history = self._history_now(call)

        # Lambda 0 and 1, as numbers, are one of the two networks.
        base_is_anchor = not isinstance(lam, Tensor) and lam > 0.5
        is_one_network = not isinstance(lam, Tensor) and lam in (0, 1)
        evaluates_both = self._is_due(history) and not is_one_network
        wanted = [evaluates_both or not base_is_anchor, evaluates_both or base_is_anchor]
        reference, anchor = self.networks.evaluate(
            call, wanted, self.clock.is_first_evaluation, as_stock=has_one(lam)
        )
        if is_one_network:
            return _single_network(reference, anchor)
        # Once it has keys and values of the text, a network may return fewer tokens than before.
        if not evaluates_both and not _fits(history[-1], _first_known([reference, anchor])):
            wanted = [reference is None, anchor is None]
            missing = self.networks.evaluate(call, wanted, as_stock=has_one(lam))
            reference = missing[0] or reference
            anchor = missing[1] or anchor
            evaluates_both = True
            history.clear()

        # The differences, as of now or on the line through the last two.
        if evaluates_both:
            differences = _differences(reference, anchor)
            now = _Evaluated(self.clock.index or 0, self.clock.fraction, differences)
            history[:] = [*history[-1:], now]
        else:
            differences = _extrapolated(history, self.clock.fraction)
        return self._mix(call, lam, reference, anchor, differences)

    def _mix(
        self,
        call: Call,
        lam: Strength,
        reference: Output | None,
        anchor: Output | None,
        differences: Sequence[Tensor | None],
    ) -> Mixed:
        """The mixture of both networks, or of the one that was evaluated and the differences."""
        first = _first_known([reference, anchor])
        mixed = Mixed(Output(list(first.leaves), first.structure))
        for position, (leaf, difference) in enumerate(zip(first.leaves, differences)):
            if difference is None:
                mixed.companions.append(None)
                continue
            (own_lam,) = self.weights([lam], leaf, position, call)
            if reference is not None and anchor is not None:
                tensors = [reference.leaves[position], anchor.leaves[position]]
                weights = [1 - own_lam, own_lam]
                mixed.output.leaves[position] = weighted_sum(tensors, weights)
                mixed.companions.append(_companions(tensors, weights))
                continue
            origin = _wide(leaf) if reference is not None else _wide(leaf) - difference
            mixture = origin + own_lam * difference
            if reference is None:
                mixture = _wide(leaf) + (own_lam - 1) * difference
            mixed.output.leaves[position] = mixture.to(leaf.dtype)
            mixed.companions.append(Companions(origin, mixture, (origin + difference,)))
        return mixed

    def _history_now(self, call: Call) -> list[_Evaluated]:
        """The history of this evaluation within its step; empty in a new call, and outside one.

        It is also empty where guidance was switched on or off in the middle of a call.
        """
        if self.clock.chain != self._chain or self.clock.index is None:
            self._chain = self.clock.chain
            self._history = {}
            self._rows = {}
        evaluation = self.clock.evaluation
        if self._rows.setdefault(evaluation, call.rows) != call.rows:
            self._rows[evaluation] = call.rows
            self._history[evaluation] = []
        return self._history.setdefault(evaluation, [])

    def _is_due(self, history: Sequence[_Evaluated]) -> bool:
        """Whether the difference has to be evaluated at this step."""
        if self.clock.index is None or not history:
            return True
        return self.clock.index - history[-1].step >= self.every


class Weights(Mode):
    """One network at theta_ref + sum lam_i (theta_i - theta_ref): the first order of mixing.

    Of a LoRA, theta_i - theta_ref is its delta. The sums take the places of the reference's weights
    for each evaluation. A single LoRA at lam = 1 acts beside the weights, as it does in the stock
    pipeline, bit for bit.
    """

    def __init__(self, parts: ModeParts) -> None:
        super().__init__(parts)
        self.path_kl = parts.path_kl
        # The sums, and the anchors with their lams and the chain that they were computed for.
        self._sums = SummedWeights(parts.denoiser)
        self._summed: list[WeightedAnchor] = []
        self._chain = 0

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
        is_reference = not any(numbers)

        def summed(own_call: Call) -> Any:
            with self._in_place(numbers, asks_for_scale(own_call.kwargs)):
                return own_call()

        needs_reference = self.path_kl and not is_reference
        output, reference = self.networks.evaluate_sum(call, summed, needs_reference)
        return _with_reference(output, output if is_reference else reference)

    @contextmanager
    def _in_place(self, lams: Sequence[float], is_scaled: bool) -> Iterator[None]:
        """The network at its lams.

        Args:
            lams: of the anchors.
            is_scaled: whether this call scales the LoRAs on the network.
        """
        anchors = [(anchor, lam) for anchor, lam in zip(self.networks.anchors, lams) if lam != 0]

        # DoRA is not a sum of weights, a bias is none, and a LoRA alone at lam = 1 is to be the
        # stock pipeline's.
        beside: list[tuple[Adapter, float]] = []
        summed: list[WeightedAnchor] = []
        is_stock = len(anchors) == 1 and not self.networks.is_compiled
        for anchor, lam in anchors:
            stays_apart = is_scaled or (is_stock and lam == 1)
            if isinstance(anchor, Adapter) and (stays_apart or not anchor.is_sum):
                beside.append((anchor, lam))
            else:
                summed.append((anchor, lam))

        for anchor, _ in summed:
            anchor.follow()
        if summed and not self._is_current(summed):
            # What was summed is noted last: a sum that fails is none.
            self._summed = []
            self._sums.compute(summed)
            self._chain = self.clock.chain
            self._summed = summed
        with ExitStack() as stack:
            if summed:
                stack.enter_context(self._sums.in_place())
            for adapter, lam in beside:
                stack.enter_context(adapter.active(lam))
            yield

    def _is_current(self, summed: Sequence[WeightedAnchor]) -> bool:
        """Whether the sums are those of these anchors and of the network as it is."""
        is_same = self.clock.chain == self._chain and self._summed == summed
        return is_same and self._sums.is_current


class Sampled(Mode):
    """One network a step, drawn with the weights as probabilities: 1 - sum lam_i and lam_i.

    It never sums weights, so that it works on quantised networks. The draws follow the golden
    ratio's sequence (one number a step, evenly spread), the same for every image, so that an image
    depends on nothing but its prompt, its seed and lam.
    """

    def __init__(self, parts: ModeParts) -> None:
        super().__init__(parts)
        self.path_kl = parts.path_kl

    def evaluate(self, call: Call, lams: Sequence[Strength]) -> Mixed:
        """Evaluate the network of this step, and the reference too where the path KL needs it.

        Raises:
            ValueError: for lams that are no probabilities, and where a cache of diffusers counts
                the network's evaluations.
        """
        self._check_no_caches("sampled")
        model = self._draw(_probabilities(lams))
        wanted = [False] * (len(lams) + 1)
        wanted[model] = True
        wanted[REFERENCE] |= self.path_kl
        outputs = self.networks.evaluate(
            call, wanted, self.clock.is_first_evaluation, as_stock=any(map(has_one, lams))
        )
        output = outputs[model]
        assert output is not None
        return _with_reference(output, outputs[REFERENCE])

    def _draw(self, probabilities: Sequence[float]) -> int:
        """The model of this step."""
        number = ((self.clock.index or 0) + 1) * GOLDEN_RATIO % 1
        total = 0.0
        for model, probability in enumerate(probabilities):
            total += probability
            if number < total:
                return model
        return len(probabilities) - 1


def _probabilities(lams: Sequence[Strength]) -> list[float]:
    """The probability of the reference and of each anchor. Raises ValueError."""
    if any(isinstance(lam, Tensor) for lam in lams):
        raise ValueError(
            "mode='sampled' draws one network for all images and regions, and so takes one lam: "
            "use mode='exact'"
        )
    numbers = [float(lam) for lam in lams]
    if min(numbers) < 0 or sum(numbers) > 1 + ROUNDING:
        raise ValueError(
            f"mode='sampled' takes lam as a probability, from 0 to 1 in sum, not {sum(numbers):g}: "
            "use mode='exact'"
        )
    return [max(0.0, 1 - sum(numbers)), *numbers]


def has_one(lam: Any) -> bool:
    """Whether lambda is 1 somewhere, where the result is the stock pipeline's with the anchor."""
    if isinstance(lam, BranchStrengths):
        return has_one(lam.conditional) or has_one(lam.unconditional)
    if isinstance(lam, Tensor):
        return bool((lam == 1).any())
    return lam == 1


def carried(mixed: Mixed, track: LostTrack, with_anchors: bool) -> Any:
    """A realigned output whose leaves carry what models predicted.

    Args:
        mixed: the output.
        track: of the chain that it belongs to.
        with_anchors: whether what each anchor predicted is carried, too. Each companion is one more
            time all that the pipeline's guidance does.
    """
    leaves = []
    for leaf, companions in zip(mixed.output.leaves, mixed.companions):
        if companions is None:
            leaves.append(leaf)
            continue
        parts = [companions.reference, companions.mixture]
        if with_anchors:
            parts += companions.anchors
        parts += companions.blocks
        leaves.append(carry(leaf, parts, track))
    return Output(leaves, mixed.output.structure).whole()


def _companions(tensors: Sequence[Tensor | None], weights: Sequence[Strength]) -> Companions:
    """What each model predicted, in tensors of their own.

    Args:
        tensors: of the reference and each anchor; None: not evaluated.
        weights: of these.
    """
    wide = [None if tensor is None else _wide(tensor).clone() for tensor in tensors]
    known = []
    for tensor, weight in zip(wide, weights):
        if tensor is not None and not is_zero(weight):
            known.append((tensor, weight))
    mixture = linear_combination([tensor for tensor, _ in known], [w for _, w in known])
    # An anchor of weight 0 is as good as the reference: its difference counts for nothing.
    own_anchors = []
    for anchor in wide[1:]:
        if anchor is None and wide[0] is not None:
            anchor = wide[0].clone()
        own_anchors.append(anchor)
    return Companions(wide[0], mixture.clone(), tuple(own_anchors))


def _wide(tensor: Tensor) -> Tensor:
    """A tensor in at least single precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _single_network(reference: Output | None, anchor: Output | None) -> Mixed:
    """The output of one network, the reference or the anchor."""
    output = _first_known([reference, anchor])
    return _with_reference(output, reference)


def _with_reference(output: Output, reference: Output | None) -> Mixed:
    """An output beside the reference's, which may be unknown or the same."""
    mixed = Mixed(output)
    for position, leaf in enumerate(output.leaves):
        if not is_mixable(leaf):
            mixed.companions.append(None)
            continue
        origin = None
        if reference is not None:
            origin = _wide(reference.leaves[position]).clone()
        mixture = _wide(leaf).clone()
        mixed.companions.append(Companions(origin, mixture, (mixture.clone(),)))
    return mixed


def _differences(reference: Output | None, anchor: Output | None) -> list[Tensor | None]:
    """The anchor's output minus the reference's, by leaf."""
    assert reference is not None
    assert anchor is not None
    differences: list[Tensor | None] = []
    for own, theirs in zip(reference.leaves, anchor.leaves):
        differences.append(_wide(theirs) - _wide(own) if is_mixable(own) else None)
    return differences


def _first_known(outputs: Sequence[Output | None]) -> Output:
    return next(output for output in outputs if output is not None)


def _fits(evaluated: _Evaluated, output: Output) -> bool:
    """Whether the differences of an earlier step have the shapes of an output."""
    for difference, leaf in zip(evaluated.differences, output.leaves):
        if difference is not None and difference.shape != leaf.shape:
            return False
    return True


def _extrapolated(history: Sequence[_Evaluated], fraction: float) -> list[Tensor | None]:
    """D at a fraction of time, on the line through the last two; the last one where it is alone."""
    last = history[-1]
    if len(history) == 1 or history[0].fraction == last.fraction:
        return last.differences
    before = history[0]
    slope = (fraction - last.fraction) / (last.fraction - before.fraction)
    result: list[Tensor | None] = []
    for newer, older in zip(last.differences, before.differences):
        if newer is None or older is None:
            result.append(None)
        else:
            result.append(newer + slope * (newer - older))
    return result
