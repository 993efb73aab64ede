"""What networks remember from one step to the next, for each model apart.

diffusers' caches (First Block Cache, TaylorSeer, Pyramid Attention Broadcast ...) keep parts of
earlier evaluations in hooks of the network, and some pipelines pass the network an object that
holds keys and values. The reference and its anchors may not read each other's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, StateManager
from torch import nn
from torch.utils._pytree import tree_map

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
    """

    def __init__(self) -> None:
        # Originals are kept, so that no other object gets their identity.
        self._copies: dict[tuple[int, int], tuple[Any, Any]] = {}

    def forget(self) -> None:
        """Begin a chain."""
        self._copies = {}

    def arguments(self, model: int, arguments: Any) -> Any:
        """A call's arguments for one model, in lists and dictionaries of its own.

        Args:
            model: 0 is the reference.
            arguments: a structure of positional and keyword arguments.
        """

        def for_model(value: Any) -> Any:
            if model == REFERENCE or _is_plain(value):
                return value
            return self._copy(model, value)

        return tree_map(for_model, arguments)

    def note_outputs(self, outputs: dict[int, list[Any]]) -> None:
        """Remember what each model returned beside tensors, in case it comes back as an argument.

        Args:
            outputs: the leaves of the output of each model that was evaluated.
        """
        first = outputs[min(outputs)]
        for model, leaves in outputs.items():
            for original, leaf in zip(first, leaves):
                if not _is_plain(original):
                    self._copies[(model, id(original))] = (original, leaf)

    def _copy(self, model: int, original: Any) -> Any:
        key = (model, id(original))
        if key not in self._copies:
            self._copies[key] = (original, copy.deepcopy(original))
        return self._copies[key][1]


def _is_state(value: Any) -> bool:
    """Whether an attribute of a hook is what a cache remembers."""
    is_named_state = type(value).__module__.startswith("diffusers.hooks.")
    return isinstance(value, StateManager | BaseState) or (
        is_named_state and type(value).__name__.endswith("State")
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN_TYPES) or callable(value)
