"""Geometric mixtures of Gaussians: the mathematics of DeRaDiff (Theorem 1 and Corollary 1), with no
diffusion in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weight = float | Tensor
"""A number, or a tensor that broadcasts to the means: Gaussians with diagonal covariances mix
element by element."""


@dataclass(frozen=True)
class Gaussian:
    """N(mean, diag(variance)). mean: (B, ...), a batch of points; variance: any shape that
    broadcasts to the mean's, often one number."""

    mean: Tensor
    variance: Tensor


def geometric_mixture(reference: Gaussian, anchor: Gaussian, lam: Weight) -> Gaussian:
    """Normalised reference^(1-lam) * anchor^lam: precisions, and precision-weighted means,
    interpolate (Corollary 1).

    lam: a number, or a tensor that broadcasts to the means: (B, 1, ...), one for each point, or a
        mask over its elements. Raises ValueError where that product cannot be normalised, as it can
        happen for lam > 1 and unequal variances.
    """
    return weighted_mixture([reference, anchor], [1 - lam, lam])


def weighted_mixture(models: Sequence[Gaussian], weights: Sequence[Weight]) -> Gaussian:
    """Normalised product of p_i^(w_i), the weights summing to 1 (Theorem 1; several anchors: w_0 =
    1 - sum lam_i, appendix A.4).

    precision P = sum w_i / v_i, mean = (sum w_i mean_i / v_i) / P, variance = 1 / P. Evaluated
    relative to the smallest variance, so that the limits hold: where all variances are equal, also
    where all are 0 (a sampler's last step), the variance stays and the means are averaged by
    weight; where one is 0 alone, that model wins. A model of weight 0 is not there, whatever its
    variance. Raises ValueError for P <= 0 or weights that do not sum to 1.
    """
    _check_sum(weights)
    models, weights = zip(
        *((g, w) for g, w in zip(models, weights) if isinstance(w, Tensor) or w != 0)
    )
    shares, smallest = _shares(models, weights)
    precision = torch.stack(shares).sum(0)  # times the smallest variance
    if precision.min() <= 0:
        raise ValueError(
            _not_normalisable(models, weights, int(precision.argmin()), precision.shape)
        )
    return Gaussian(
        sum(share * g.mean for share, g in zip(shares, models)) / precision, smallest / precision
    )


def log_normaliser(models: Sequence[Gaussian], weights: Sequence[Weight]) -> Tensor:
    """log of the integral of prod p_i(x)^(w_i), one number a batch row: (B,). Variances must be
    positive.

    -1/2 sum over dimensions of [sum w_i ln v_i + ln P] + sum w_i (mean_i - mean)^2 / v_i, with P
    and mean of `weighted_mixture`; at equal variances and two models: -1/2 lam (1 - lam) |mean_a -
    mean_ref|^2 / v.
    """
    mixture = weighted_mixture(models, weights)
    logs = sum(w * g.variance.log() for w, g in zip(weights, models)) - mixture.variance.log()
    spread = sum(w * (g.mean - mixture.mean).square() / g.variance for w, g in zip(weights, models))
    return -0.5 * (logs + spread).flatten(1).sum(1)


def kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) in nats, one number a batch row: (B,). Variances must be positive."""
    ratio = p.variance / q.variance
    return 0.5 * (ratio - 1 - ratio.log() + (p.mean - q.mean).square() / q.variance).flatten(1).sum(
        1
    )


def _shares(models: Sequence[Gaussian], weights: Sequence[Weight]) -> tuple[list[Tensor], Tensor]:
    """w_i v_min / v_i of each model, and v_min, the smallest variance of the models that have a
    weight there."""
    variances, parts = (
        [g.variance for g in models],
        [torch.as_tensor(w, device=models[0].mean.device) for w in weights],
    )
    if any(w.ndim for w in parts):
        shape = torch.broadcast_shapes(*(v.shape for v in variances), *(w.shape for w in parts))
        variances = [
            torch.where(w == 0, torch.inf, v).expand(shape) for v, w in zip(variances, parts)
        ]
    variances = list(torch.broadcast_tensors(*variances))
    smallest = torch.stack(variances).amin(0)
    return [
        w * torch.where(v == smallest, torch.ones_like(v), smallest / v)
        for v, w in zip(variances, weights)
    ], smallest


def _check_sum(weights: Sequence[Weight]) -> None:
    total = torch.as_tensor(sum(weights))
    tolerance = (
        1e-9
        if all(not isinstance(w, Tensor) or w.dtype == torch.float64 for w in weights)
        else 1e-5
    )
    if (total - 1).abs().max() > tolerance:
        raise ValueError(
            f"the weights of a mixture must sum to 1, and {list(weights)} sum to "
            f"{total.flatten()[0].item():.6g}"
        )


def _not_normalisable(
    models: Sequence[Gaussian], weights: Sequence[Weight], place: int, shape: torch.Size
) -> str:
    """What is wrong at the element, counted through `shape`, where the precision is lowest."""
    lams = [torch.as_tensor(w).expand(shape).flatten()[place].item() for w in weights]
    numbers = [g.variance.expand(shape).flatten()[place].item() for g in models]
    variances, lam = ", ".join(f"{v:.6g}" for v in numbers), lams[-1]
    if len(models) > 2 or lam <= 1:
        return (
            f"no normalisable mixture of variances {variances} with weights {lams}: its "
            f"precision is not positive"
        )
    return (
        f"no normalisable mixture at lam={lam:.6g} of variances {variances} (reference, anchor): "
        f"lam > 1 needs anchor variance / reference variance < lam / (lam - 1) = "
        f"{lam / (lam - 1):.6g}"
    )
