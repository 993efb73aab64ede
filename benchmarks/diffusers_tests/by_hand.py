"""The realigned chain by hand: what the dial has to equal, without any of its code.

Each evaluation of a network is made twice, with the reference's weights and with the anchor's, and
the outputs are mixed in double precision. A second run on the same latents, with the reference's
outputs, tells what guidance makes of these, and so the path KL.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.diffusers_tests.anchors import Weights, in_place
from benchmarks.diffusers_tests.subject import Subject
from deradiff.method.transitions import kl_factors

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Generator, nn.Module)
"""Types of arguments that a network remembers nothing in."""


class _Step(NamedTuple):
    """What guidance made of the networks' outputs, and whether the pipeline's own scheduler got it.

    A pipeline may take further steps with copies of its scheduler, as LTX-2 does for its sound.
    """

    guided: Tensor
    is_own: bool


class ByHand:
    """A chain that is mixed by hand.

    Args:
        subject: the pipeline.
        weights: of the anchor, for each of its networks.
        lam: lambda.
    """

    def __init__(self, subject: Subject, weights: Mapping[str, Weights], lam: float) -> None:
        self.subject = subject
        self.weights = weights
        self.lam = lam
        # What guidance made of the mixture at each step, chain by chain.
        self._chains: list[list[_Step]] = []

    def sample(self) -> Tensor:
        """What the pipeline makes of the mixture."""
        self._chains = [[]]

        def note(guided: Tensor, is_own: bool) -> Tensor:
            self._chains[-1].append(_Step(guided.clone(), is_own))
            return guided

        with self._evaluations(self.lam), self._steps(note, lambda: self._chains.append([])):
            return self.subject.sample()

    @property
    def steps(self) -> list[Tensor]:
        """What guidance made of the mixture at each step of the last chain of the last `sample`."""
        return _of_last_chain(self._chains)

    def path_kl(self) -> Tensor:
        """The path KL of each image (images,) in the last chain, after `sample`.

        Raises:
            ValueError: where the scheduler does not tell its noise levels.
        """
        chains: list[list[_Step]] = [[]]

        # Every scheduler, that of the sound too, goes on with the mixture.
        def take_mixture(reference: Tensor, is_own: bool) -> Tensor:
            steps = chains[-1]
            steps.append(_Step(reference.clone(), is_own))
            return self._chains[len(chains) - 1][len(steps) - 1].guided

        with self._evaluations(0.0), self._steps(take_mixture, lambda: chains.append([])):
            self.subject.sample()
        mixtures = self.steps
        references = _of_last_chain(chains)
        factors = kl_factors(self.subject.pipe.scheduler)[-len(mixtures) :]
        total = torch.zeros(len(mixtures[0]), dtype=torch.float64)
        for factor, mixture, reference in zip(factors, mixtures, references):
            shift = mixture.double() - reference.double()
            total += factor * shift.square().flatten(1).sum(1)
        return total

    @contextmanager
    def _evaluations(self, lam: float) -> Iterator[None]:
        """Have each network answer with the mixture at a lambda."""
        with ExitStack() as stack:
            for name, weights in self.weights.items():
                network: Any = getattr(self.subject.pipe, name)
                mixed = mixing_forward(network, weights, lam)
                stack.enter_context(patch.object(network, "forward", mixed))
            yield

    @contextmanager
    def _steps(
        self, replace: Callable[[Tensor, bool], Tensor], begin: Callable[[], object]
    ) -> Iterator[None]:
        """Have the pipeline's scheduler, and copies of it, take steps with other guided outputs.

        Args:
            replace: gets the guided output, and whether the step is one of the pipeline's own
                scheduler; returns the output to take.
            begin: is called where a chain begins.
        """
        scheduler = self.subject.pipe.scheduler
        kind: Any = type(scheduler)
        own_step = kind.step
        own_set_timesteps = kind.set_timesteps
        signature = inspect.signature(own_step)

        # On the class: pipelines copy schedulers, and read the signature of `step`.
        @functools.wraps(own_step)
        def step(instance: Any, *args: Any, **kwargs: Any) -> Any:
            call = signature.bind(instance, *args, **kwargs)
            output = call.arguments["model_output"]
            call.arguments["model_output"] = replace(output, instance is scheduler)
            return own_step(*call.args, **call.kwargs)

        @functools.wraps(own_set_timesteps)
        def set_timesteps(instance: Any, *args: Any, **kwargs: Any) -> Any:
            if instance is scheduler:
                begin()
            return own_set_timesteps(instance, *args, **kwargs)

        with (
            patch.object(kind, "step", step),
            patch.object(kind, "set_timesteps", set_timesteps),
        ):
            yield


def _of_last_chain(chains: Sequence[Sequence[_Step]]) -> list[Tensor]:
    """What the pipeline's own scheduler got in the last chain in which it took steps."""
    last: list[Tensor] = []
    for chain in chains:
        taken = [step.guided for step in chain if step.is_own]
        last = taken or last
    return last


def mixing_forward(network: nn.Module, weights: Weights, lam: float) -> Callable[..., Any]:
    """A forward that evaluates a network with two sets of weights and mixes the outputs.

    Args:
        network: with the reference's weights.
        weights: the anchor's.
        lam: lambda.
    """
    forward = network.forward
    memory = _Memory()

    @functools.wraps(forward)
    def mixed(*args: Any, **kwargs: Any) -> Any:
        # Networks write into lists and objects that they are given, and some draw numbers.
        other_args, other_kwargs = memory.of_anchor((args, kwargs))
        start = torch.get_rng_state()
        reference = forward(*args, **kwargs)
        torch.set_rng_state(start)
        with in_place(network, weights):
            anchor = forward(*other_args, **other_kwargs)
        return memory.mixture(reference, anchor, lam)

    return mixed


class _Memory:
    """What the anchor remembers where the reference has an object of keys and values."""

    def __init__(self) -> None:
        # The reference's object is kept, so that no other one gets its identity.
        self._pairs: dict[int, tuple[Any, Any]] = {}

    def of_anchor(self, value: Any) -> Any:
        """Arguments of the reference's evaluation as the anchor gets them."""
        if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
            return type(value)(self.of_anchor(part) for part in value)
        if type(value) is dict:
            return {key: self.of_anchor(part) for key, part in value.items()}
        if isinstance(value, (Tensor, *PLAIN)) or callable(value):
            return value
        if id(value) not in self._pairs:
            self._pairs[id(value)] = (value, copy.deepcopy(value))
        return self._pairs[id(value)][1]

    def mixture(self, reference: Any, anchor: Any, lam: float) -> Any:
        """The mixture of two outputs, in whatever structure."""
        if isinstance(reference, Tensor):
            if not reference.is_floating_point():
                return reference
            sum_of_both = (1 - lam) * reference.double() + lam * anchor.double()
            return sum_of_both.to(reference.dtype)
        if isinstance(reference, Mapping):
            parts = {}
            for key, part in reference.items():
                parts[key] = self.mixture(part, anchor[key], lam)
            return parts if type(reference) is dict else type(reference)(**parts)
        if isinstance(reference, tuple | list):
            pairs = zip(reference, anchor)
            return type(reference)(self.mixture(own, theirs, lam) for own, theirs in pairs)
        self._pairs[id(reference)] = (reference, anchor)
        return reference
