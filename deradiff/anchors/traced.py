"""Which tensors of a file a converter has used.

diffusers' converters of LoRA files drop what they do not know, at most with a line in the log. Here
every tensor of the file knows its name, whatever the converter makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

READERS = (Tensor.item, Tensor.tolist, Tensor.__float__)
"""Functions that make plain numbers of a tensor, which know no name any more."""


class TracedTensor(Tensor):
    """A tensor that knows which tensors of a file it was made from.

    Attributes:
        sources: the names of those tensors.
        is_number: whether each of them is one number.
        numbers_read: the names of the tensors of one number, such as alpha, that were read as a
            plain one; all tensors of a file share it. Of larger ones only a summary can be read,
            which is no use of them.
    """

    sources: frozenset[str]
    numbers_read: set[str]
    is_number: bool

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch, and note on its results what they were made from."""
        leaves = tree_leaves((args, kwargs))
        traced = [leaf for leaf in leaves if hasattr(leaf, "sources")]
        sources = frozenset().union(*(leaf.sources for leaf in traced))
        if func in READERS and traced[0].is_number:
            traced[0].numbers_read.update(sources)

        result = super().__torch_function__(func, types, args, kwargs or {})
        targets = tree_leaves(result)
        if func is Tensor.__setitem__:
            targets = [args[0]]
        for target in targets:
            if isinstance(target, TracedTensor):
                target.sources = sources
                target.numbers_read = traced[0].numbers_read
                target.is_number = all(leaf.is_number for leaf in traced)
        return result


def traced_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, which know their names from now on."""
    numbers_read: set[str] = set()
    traced: dict[str, Tensor] = {}
    for key, value in state.items():
        tensor = value.as_subclass(TracedTensor)
        tensor.sources = frozenset([key])
        tensor.numbers_read = numbers_read
        tensor.is_number = value.numel() == 1
        traced[key] = tensor
    return traced


def plain(value: Any) -> Any:
    """A tensor without its trace; anything else as it is."""
    return value.as_subclass(Tensor) if isinstance(value, TracedTensor) else value


def unused_names(traced: Mapping[str, Any], results: Iterable[Any]) -> list[str]:
    """The names of a file's tensors that nothing was made from.

    Args:
        traced: what `traced_state` made of the file.
        results: what the converter has returned.
    """
    used: set[str] = set()
    for tensor in traced.values():
        used |= tensor.numbers_read
    for result in results:
        used |= getattr(result, "sources", frozenset())
    return [key for key in traced if key not in used]
