"""What networks remember from one step to the next, for each model apart.

diffusers' caches (First Block Cache, TaylorSeer, Pyramid Attention Broadcast ...) keep parts of
earlier evaluations in hooks of the network, and some pipelines pass the network an object that
holds keys and values. The reference and its anchors may not read each other's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, StateManager
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

PLAIN_TYPES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.Tensor,
    torch.dtype,
    torch.device,
    torch.Generator,
    torch.Size,
    nn.Module,
)
"""Types of arguments that a network does not remember things in."""

REFERENCE = 0

MISSED = (
    "the pipeline keeps keys and values of earlier steps, and a network that is needed now (the "
    "reference or an anchor) was not evaluated there: use mode='exact' with a lam that is nowhere "
    "0 or 1, or switch off what the pipeline keeps"
)
"""Why a model cannot go on."""


class CacheStates:
    """The states of diffusers' caches on a network, one for each model.

    Args:
        denoiser: the reference network.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser
        # (hook, attribute, the state that diffusers put there)
        self._places: list[tuple[Any, str, Any]] = []
        # The state of a model in place of diffusers' own.
        self._states: dict[tuple[int, int], Any] = {}

    @property
    def has_caches(self) -> bool:
        """Whether a cache is switched on."""
        return bool(self._places)

    def refresh(self) -> None:
        """Begin a chain: look for caches anew, and forget what the models remember."""
        self._states = {}
        self._places = []
        for module in self.denoiser.modules():
            registry = getattr(module, "_diffusers_hook", None)
            if registry is None:
                continue
            for hook in registry.hooks.values():
                for name, value in vars(hook).items():
                    if _is_state(value):
                        self._places.append((hook, name, value))

    @contextmanager
    def of(self, model: int) -> Iterator[None]:
        """Have the caches remember for one model.

        Args:
            model: 0 is the reference, which has diffusers' own states.
        """
        if model == REFERENCE or not self._places:
            yield
            return
        for hook, name, original in self._places:
            setattr(hook, name, self._state(model, original))
        try:
            yield
        finally:
            for hook, name, original in self._places:
                setattr(hook, name, original)

    def _state(self, model: int, original: Any) -> Any:
        """A model's state in place of an original one, which several hooks may share."""
        key = (model, id(original))
        if key not in self._states:
            state = copy.deepcopy(original)
            state.reset()
            self._states[key] = state
        state = self._states[key]
        if isinstance(original, StateManager):
            state.set_context(original._context)
        return state


class Memories:
    """Objects that a pipeline passes to its network for it to remember things in, for each model.

    The reference gets the pipeline's own, and each anchor a copy from before the first evaluation.
    A model that is not evaluated while others write into theirs has missed something.
    """

    def __init__(self) -> None:
        # Originals are kept, so that no other object gets their identity.
        self._copies: dict[tuple[int, int], tuple[Any, Any]] = {}
        # The models that have missed something, by the identity of the original.
        self._missed: dict[int, set[int]] = {}

    def forget(self) -> None:
        """Begin a chain."""
        self._copies = {}
        self._missed = {}

    def arguments(self, model: int, arguments: Any) -> Any:
        """A call's arguments for one model, in lists and dictionaries of its own.

        Args:
            model: 0 is the reference.
            arguments: a structure of positional and keyword arguments.

        Raises:
            ValueError: for a model that has missed what the others remember.
        """

        def for_model(value: Any) -> Any:
            if _is_plain(value):
                return value
            if model in self._missed.get(id(value), ()):
                raise ValueError(MISSED)
            return value if model == REFERENCE else self._copy(model, value)

        return tree_map(for_model, arguments)

    def note_evaluation(
        self,
        arguments: Any,
        watch: Watch,
        outputs: dict[int, list[Any]],
        others: Iterable[int],
    ) -> None:
        """Remember what each model returned, and which models missed that something was written.

        What is returned beside tensors may come back as an argument.

        Args:
            arguments: the pipeline's own.
            watch: of the same arguments as one model had them, from before the evaluation.
            outputs: the leaves of the output of each model that was evaluated.
            others: the models that were not evaluated.
        """
        given = _objects_in(arguments)
        written = [value for value, is_written in zip(given, watch.are_written()) if is_written]
        first = outputs[min(outputs)]
        known = {id(value) for value in given}
        written += [leaf for leaf in first if not _is_plain(leaf) and id(leaf) not in known]
        for original in written:
            self._missed.setdefault(id(original), set()).update(others)

        for model, leaves in outputs.items():
            for original, leaf in zip(first, leaves):
                if not _is_plain(original):
                    self._copies[(model, id(original))] = (original, leaf)

    def _copy(self, model: int, original: Any) -> Any:
        key = (model, id(original))
        if key not in self._copies:
            self._copies[key] = (original, copy.deepcopy(original))
        return self._copies[key][1]


class Watch:
    """Sees whether a network writes into objects that it is given.

    Args:
        arguments: of one evaluation, which is about to begin.
    """

    def __init__(self, arguments: Any) -> None:
        self._objects = _objects_in(arguments)
        self._before = [_content(value) for value in self._objects]

    def are_written(self) -> list[bool]:
        """Whether each object among the arguments now holds something else."""
        found = []
        for value, before in zip(self._objects, self._before):
            found.append(not _is_same_content(before, _content(value)))
        return found


class ProcessorWatch:
    """Sees whether a network's attention processors keep something of an evaluation.

    Those of prompt-to-prompt and LEDITS++ count evaluations, or keep their maps. They belong to the
    pipeline, which reads them, and cannot tell one model from another.

    Args:
        network: that is about to be evaluated.
    """

    def __init__(self, network: Any) -> None:
        processors = getattr(network, "attn_processors", {}).values()
        self._processors = {id(processor): processor for processor in processors}
        self._before = {key: _content(own) for key, own in self._processors.items()}

    def check(self) -> None:
        """Raise ValueError where a processor has kept something since the watch began."""
        for key, processor in self._processors.items():
            if not _is_same_content(self._before[key], _content(processor)):
                raise ValueError(
                    f"an attention processor ({type(processor).__name__}) keeps something of each "
                    "evaluation of the network, and there are several for a step: use "
                    "mode='weights', or a lam of 0 or 1"
                )


def has_objects(values: Any) -> bool:
    """Whether there are objects among arguments or outputs that a network remembers things in."""
    return bool(_objects_in(values))


def _objects_in(arguments: Any) -> list[Any]:
    """The objects among arguments that a network may remember things in."""
    return [leaf for leaf in tree_leaves(arguments) if not _is_plain(leaf)]


def _content(value: Any) -> list[tuple[Any, Any]]:
    """All parts of an object, each with a number that changes where a tensor is written into."""
    found: list[tuple[Any, Any]] = []
    ahead = [value]
    seen = set()
    while ahead:
        part = ahead.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, torch.Tensor):
            # A tensor of inference mode does not count: it may have been written into.
            found.append((part, object() if part.is_inference() else part._version))
        elif isinstance(part, dict):
            ahead += part.values()
        elif isinstance(part, list | tuple | set):
            ahead += part
        elif hasattr(part, "__dict__") and not isinstance(part, (*PLAIN_TYPES, type)):
            ahead += vars(part).values()
        else:
            found.append((part, None))
    return found


def _is_same_content(before: list[tuple[Any, Any]], after: list[tuple[Any, Any]]) -> bool:
    """Whether the parts of an object are what they were."""
    return len(before) == len(after) and all(map(_is_same_part, before, after))


def _is_same_part(before: tuple[Any, Any], after: tuple[Any, Any]) -> bool:
    """Whether a part of an object is what it was."""
    if before[1] != after[1]:
        return False
    return before[0] is after[0] or (
        not isinstance(before[0], torch.Tensor) and bool(before[0] == after[0])
    )


def _is_state(value: Any) -> bool:
    """Whether an attribute of a hook is what a cache remembers."""
    is_named_state = type(value).__module__.startswith("diffusers.hooks.")
    return isinstance(value, StateManager | BaseState) or (
        is_named_state and type(value).__name__.endswith("State")
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN_TYPES) or callable(value)
