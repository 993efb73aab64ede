"""Geometric mixtures of Gaussians: the mathematics of DeRaDiff (Theorem 1 and Corollary 1), with no diffusion in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """N(mean, variance I). mean: (B, ...), a batch of points; variance: any shape that broadcasts to the mean's, often a single number."""

    mean: Tensor
    variance: Tensor


def geometric_mixture(reference: Gaussian, anchor: Gaussian, lam: float) -> Gaussian:
    """Normalised reference^(1-lam) * anchor^lam: precisions, and precision-weighted means, interpolate (Corollary 1).

    Raises ValueError where that product cannot be normalised, as it can happen for lam > 1 and unequal variances.
    """
    return weighted_mixture([reference, anchor], [1 - lam, lam])


def weighted_mixture(models: Sequence[Gaussian], weights: Sequence[float]) -> Gaussian:
    """Normalised product of p_i^(w_i), the weights summing to 1 (Theorem 1; several anchors: w_0 = 1 - sum lam_i, appendix A.4).

    precision P = sum w_i / v_i, mean = (sum w_i mean_i / v_i) / P, variance = 1 / P. Evaluated relative to the smallest variance, so
    that the limits hold: where all variances are equal, also where all are 0 (a sampler's last step), the variance stays and the
    means are averaged by weight; where one is 0 alone, that model wins. Raises ValueError for P <= 0 or weights that do not sum to 1.
    """
    if not math.isclose(sum(weights), 1, abs_tol=1e-9):
        raise ValueError(f"the weights of a mixture must sum to 1, and {list(weights)} sum to {sum(weights):.6g}")
    models, weights = zip(*((g, w) for g, w in zip(models, weights) if w != 0))
    variances = torch.broadcast_tensors(*(g.variance for g in models))
    smallest = torch.stack(variances).amin(0)
    shares = [w * torch.where(v == smallest, torch.ones_like(v), smallest / v) for v, w in zip(variances, weights)]
    precision = torch.stack(shares).sum(0)  # times the smallest variance
    if precision.min() <= 0:
        raise ValueError(_not_normalisable(models, weights))
    return Gaussian(sum(share * g.mean for share, g in zip(shares, models)) / precision, smallest / precision)


def log_normaliser(models: Sequence[Gaussian], weights: Sequence[float]) -> Tensor:
    """log of the integral of prod p_i(x)^(w_i), one number a batch row: (B,). Variances must be positive.

    -1/2 sum over dimensions of [sum w_i ln v_i + ln P] + sum w_i (mean_i - mean)^2 / v_i, with P and mean of `weighted_mixture`;
    at equal variances and two models: -1/2 lam (1 - lam) |mean_a - mean_ref|^2 / v.
    """
    mixture = weighted_mixture(models, weights)
    logs = sum(w * g.variance.log() for w, g in zip(weights, models)) - mixture.variance.log()
    spread = sum(w * (g.mean - mixture.mean).square() / g.variance for w, g in zip(weights, models))
    return -0.5 * (logs + spread).flatten(1).sum(1)


def kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) in nats, one number a batch row: (B,). Variances must be positive."""
    ratio = p.variance / q.variance
    return 0.5 * (ratio - 1 - ratio.log() + (p.mean - q.mean).square() / q.variance).flatten(1).sum(1)


def _not_normalisable(models: Sequence[Gaussian], weights: Sequence[float]) -> str:
    variances = ", ".join(f"{g.variance.flatten()[0].item():.6g}" for g in models)
    if len(models) > 2 or weights[-1] <= 1:
        return f"no normalisable mixture of variances {variances} with weights {list(weights)}: its precision is not positive"
    lam = weights[-1]
    return (
        f"no normalisable mixture at lam={lam} of variances {variances} (reference, anchor): "
        f"lam > 1 needs anchor variance / reference variance < lam / (lam - 1) = {lam / (lam - 1):.6g}"
    )
