"""A network's output on its way to the scheduler, in company of what other models predicted.

Between the network and the scheduler lies the pipeline's guidance: classifier-free guidance in one
batch or in several calls, a rescaling, a sign, a slice. What it does is in the code of each
pipeline, and no attribute tells it. So the output travels through that code as a tensor that has
*companions*, the outputs of the reference and the anchors on the same input. Each operation on it
is done to the companions as well, and `scheduler.step` receives the guided output of every model.
The output itself passes through the same operations as a plain tensor, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

Function = Callable[..., Any]

RANDOM_FUNCTIONS = frozenset(
    {"rand_like", "randn_like", "randint_like", "bernoulli", "multinomial", "normal", "dropout"}
)
"""Functions that draw random numbers. They run once, so that the stream of numbers stays."""

CASTS = frozenset({"to", "type", "type_as", "half", "bfloat16", "float", "double"})
"""Methods that change the precision. Companions keep theirs, or get a higher one."""

ASSIGNMENTS = frozenset(
    {
        "__setitem__",
        "__iadd__",
        "__isub__",
        "__imul__",
        "__itruediv__",
        "__ifloordiv__",
        "__ipow__",
    }
)
"""Methods that change their tensor, beside those whose names end with an underscore."""


class LostTrack:
    """Whether a value of some chain left its companions behind.

    Attributes:
        is_lost: an operation wrote a tensor with companions into one without.
    """

    def __init__(self) -> None:
        self.is_lost = False


class CarrierTensor(Tensor):
    """A tensor whose companions go through the same operations.

    Make one with `carry`, and take it apart with `plain` and `companions_of`.

    Attributes:
        companions: tensors of its shape in at least single precision, on its device; None where a
            companion is unknown, or where an operation could not be done to it.
        track: of the chain that the tensor belongs to.
    """

    companions: tuple[Tensor | None, ...]
    track: LostTrack

    @classmethod
    def __torch_function__(
        cls,
        func: Function,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do an operation to the tensor, and then to each of its companions."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__set__":
            return _set_attribute(func, args)
        operation = _Operation(func, name, args, kwargs)
        if _writes(name, kwargs):
            return _write(operation, args, kwargs)
        result = operation.on_outputs()
        leaves, structure = tree_flatten(result)
        has_values = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
        if not has_values or name in RANDOM_FUNCTIONS:
            return result

        # The same for each companion, and then each part of the result with its companions.
        first = operation.carriers[0]
        results = []
        for number in range(len(first.companions)):
            results.append(operation.on_companions(number, result))
        wrapped = []
        for position, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                wrapped.append(leaf)
                continue
            companions = [None if parts is None else parts[position] for parts in results]
            wrapped.append(carry(leaf, companions, first.track))
        return tree_unflatten(wrapped, structure)


def carry(output: Tensor, companions: Sequence[Tensor | None], track: LostTrack) -> CarrierTensor:
    """A tensor with companions.

    Args:
        output: the tensor. It is not copied, as its companions are not: they may not share memory.
        companions: of its shape; None: unknown.
        track: of the chain.
    """
    carrier = output.as_subclass(CarrierTensor)
    carrier.companions = tuple(companions)
    carrier.track = track
    return carrier


def plain(value: Any) -> Any:
    """The tensor alone, without its companions; any other value as it is."""
    if not isinstance(value, CarrierTensor):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


def all_plain(values: Any) -> Any:
    """A structure of values in which no tensor has companions."""
    return tree_map(plain, values)


def companions_of(value: Any) -> tuple[Tensor | None, ...] | None:
    """The companions of a tensor; None where it has none, or where its chain has lost track."""
    if not isinstance(value, CarrierTensor) or value.track.is_lost:
        return None
    return value.companions


class _Operation:
    """A function with its arguments, to be done to tensors and to each of their companions.

    Args:
        func: the function.
        name: of the function.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Attributes:
        carriers: the tensors with companions among the arguments.
    """

    def __init__(
        self, func: Function, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        self._func = func
        self._name = name
        self._positions = len(args)
        self._keywords = tuple(kwargs)
        # Taken apart once for all models: this is host time at every operation of the guidance.
        self._leaves, self._structure = tree_flatten([*args, *kwargs.values()])
        self.carriers = [leaf for leaf in self._leaves if isinstance(leaf, CarrierTensor)]

    def on_outputs(self) -> Any:
        """The result for the tensors alone."""
        return self._call([plain(leaf) for leaf in self._leaves])

    def on_companions(self, number: int, result: Any) -> list[Any] | None:
        """The leaves of the result for one companion of each tensor; None: unknown.

        Args:
            number: of the companion.
            result: for the tensors alone.
        """
        companions: list[Any] = [_companion(carrier, number) for carrier in self.carriers]
        if any(companion is None for companion in companions):
            return None
        if self._name in CASTS:
            wide = torch.promote_types(companions[0].dtype, result.dtype)
            return [companions[0].to(result.device, wide)]

        following = iter(companions)
        leaves = []
        for leaf in self._leaves:
            is_carrier = isinstance(leaf, CarrierTensor)
            leaves.append(next(following) if is_carrier else _widened(leaf))
        try:
            parts, _ = tree_flatten(self._call(leaves))
        except Exception:
            # The pipeline goes on with the output itself; what the companions lack becomes nan.
            return None
        return parts

    def _call(self, leaves: list[Any]) -> Any:
        """The function on arguments with other leaves, in plain torch."""
        values = tree_unflatten(leaves, self._structure)
        kwargs = dict(zip(self._keywords, values[self._positions :]))
        with torch._C.DisableTorchFunctionSubclass():
            return self._func(*values[: self._positions], **kwargs)


def _companion(carrier: CarrierTensor, number: int) -> Tensor | None:
    companions = carrier.companions
    return companions[number] if number < len(companions) else None


def _widened(value: Any) -> Any:
    """A tensor in the precision of companions, which is single or double."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.promote_types(value.dtype, torch.float32))
    return value


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function changes a tensor that it is given.

    Args:
        name: of the function.
        kwargs: its keyword arguments.
    """
    is_in_place = name.endswith("_") and not name.endswith("__")
    return is_in_place or name in ASSIGNMENTS or kwargs.get("out") is not None


def _write(operation: _Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Change a tensor, and its companions where it has any."""
    target = kwargs.get("out")
    if target is None:
        target = args[0]
    result = operation.on_outputs()
    if not isinstance(target, CarrierTensor):
        for carrier in operation.carriers:
            carrier.track.is_lost = True
        return result

    # The companions share memory with others where the target is a view: they are changed in place.
    for number, companion in enumerate(target.companions):
        if companion is not None and operation.on_companions(number, result) is None:
            target.track.is_lost = True
    return target if isinstance(result, Tensor) else result


def _set_attribute(func: Function, args: Sequence[Any]) -> Any:
    """Set an attribute such as `data`, which the companions cannot follow."""
    for value in args:
        if isinstance(value, CarrierTensor):
            value.track.is_lost = True
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args)
