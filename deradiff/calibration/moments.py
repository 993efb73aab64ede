"""What one pass of the networks over preference pairs leaves: the errors of every mixture.

An anchor's output is the reference's plus D. A mixture's output is the reference's plus lam D, so
that its squared error, less the reference's, is

    e(lam) = -2 lam a + lam^2 b,    a = mean <target - output_ref, D>,    b = mean |D|^2

with means over C, H and W. With several anchors a is a vector and b a matrix. No network is needed
for another lambda, nor for another beta.

Shapes: N pairs, M draws of a timestep and noise for each of them, K anchors. The axis of 2 is the
winner and the loser, in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """The inner products from which the errors of every mixture follow.

    Attributes:
        projection: (N, M, 2, K), a.
        gram: (N, M, 2, K, K), b; between two anchors the mean of <D_i, D_j>.
        reference_error: (N, M, 2), the reference's mean squared error.
        times: (N, M), the time of each draw: 0 is data, 1 is noise.
        training_weights: (N, M), what makes a mean over the draws one over the timesteps as
            training draws them. Their mean is about 1.
        path_weights: (N, M), the same for timesteps in proportion to the KL of their step.
    """

    projection: Array
    gram: Array
    reference_error: Array
    times: Array
    training_weights: Array
    path_weights: Array

    @property
    def pairs(self) -> int:
        """N."""
        return len(self.times)

    @property
    def draws(self) -> int:
        """M."""
        return self.times.shape[1]

    @property
    def anchors(self) -> int:
        """K."""
        return self.projection.shape[-1]

    def of(self, anchor: int) -> Moments:
        """The moments of one anchor alone.

        Args:
            anchor: its number.
        """
        one = slice(anchor, anchor + 1)
        return Moments(
            self.projection[..., one],
            self.gram[..., one, one],
            self.reference_error,
            self.times,
            self.training_weights,
            self.path_weights,
        )

    def errors(self, lams: Sequence[float] | Array) -> Array:
        """e, (N, M, 2): a mixture's mean squared error less the reference's.

        Args:
            lams: (K,), lambda of each anchor.
        """
        lams = np.asarray(lams, dtype=np.float64)
        linear = self.projection @ lams
        square = np.einsum("nmsij,i,j->nms", self.gram, lams, lams)
        return -2 * linear + square

    def margins(self, lams: Sequence[float] | Array, beta: float) -> Array:
        """(N, M): the implicit reward of the winner less that of the loser.

        As of `deradiff.training.dpo.dpo_terms`.

        Args:
            lams: (K,), lambda of each anchor.
            beta: in the convention `mean-half`.
        """
        errors = self.errors(lams)
        return -0.5 * beta * (errors[..., 0] - errors[..., 1])


def joined(parts: Sequence[Moments]) -> Moments:
    """The moments of all pairs of several parts, in their order."""
    values = {}
    for name in Moments.__dataclass_fields__:
        values[name] = np.concatenate([getattr(part, name) for part in parts])
    return Moments(**values)
