"""Which of two images scorers prefer, and how far they agree. Arrays in, numbers out.

Shapes: N images, S scorers, M = N (N - 1) / 2 pairs of images.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deradiff.evaluation.statistics import Array


def pairs_of(count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The numbers of the images of every pair: (M,) of the first one, (M,) of the second one.

    Args:
        count: N.
    """
    return np.triu_indices(count, k=1)


def preferences(scores: Array) -> Array:
    """Which image of each pair each scorer prefers.

    Args:
        scores: (N, S).

    Returns:
        (M, S): 1 for the first image, -1 for the second one, 0 for a tie.
    """
    first, second = pairs_of(len(scores))
    return np.sign(scores[first] - scores[second])


def same_preference(preferred: Array) -> Array:
    """The share of pairs on which two scorers prefer the same image; a tie of either counts half.

    Args:
        preferred: (M, S), of `preferences`.

    Returns:
        (S, S), in [0, 1]; nan without a pair.
    """
    if not len(preferred):
        return np.full((preferred.shape[1],) * 2, np.nan)
    return (1 + preferred.T @ preferred / len(preferred)) / 2


def kendall_tau(preferred: Array) -> Array:
    """Kendall's tau-b (1945) of two scorers' rankings: 1 for the same, -1 for the reverse.

    It is the pairs on which they agree less those on which they differ, over the geometric mean of
    the pairs that each tells apart.

    Args:
        preferred: (M, S), of `preferences` of all images that are ranked.

    Returns:
        (S, S); nan where a scorer tells no pair apart.
    """
    products = preferred.T @ preferred
    told_apart = np.diag(products)
    with np.errstate(invalid="ignore", divide="ignore"):
        return products / np.sqrt(np.outer(told_apart, told_apart))
