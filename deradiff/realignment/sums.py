"""Weighted sums of tensors, as the modes mix outputs and weights.

A weight is a number, or a tensor that broadcasts to what it multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deradiff.method.lambdas import Strength


def is_zero(weight: Strength) -> bool:
    """Whether a weight is 0 everywhere."""
    if isinstance(weight, Tensor):
        return not bool(weight.any())
    return weight == 0


def is_mixable(leaf: Any) -> bool:
    """Whether a part of an output is a tensor of numbers."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


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
