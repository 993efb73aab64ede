"""Compiled blocks: the parts of a network that repeat, compiled once for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def compiled_blocks(network: nn.Module) -> Iterator[None]:
    """Compile the blocks that repeat in a network; those that the user has compiled stay theirs.

    Args:
        network: a network of diffusers.

    Raises:
        ValueError: for a network in which no blocks repeat.
    """
    blocks = [block for block in repeated_blocks(network) if block._compiled_call_impl is None]
    for block in blocks:
        block.compile()
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def repeated_blocks(network: Any) -> list[nn.Module]:
    """The blocks that repeat in a network.

    Args:
        network: diffusers names their classes for some networks (`_repeated_blocks`). Of others,
            they are what the network's own lists hold.

    Raises:
        ValueError: where there are none.
    """
    classes = getattr(network, "_repeated_blocks", None) or []
    blocks = [module for module in network.modules() if type(module).__name__ in classes]
    if not classes:
        for child in network.children():
            if isinstance(child, nn.ModuleList) and len(child) > 1:
                blocks.extend(child)
    if not blocks:
        raise ValueError(
            f"no blocks repeat in a {type(network).__name__}, so compile=True has nothing to "
            "compile: remove it"
        )
    return blocks
