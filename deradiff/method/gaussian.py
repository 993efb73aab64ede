"""Geometric mixtures of Gaussians: Theorem 1 and Corollary 1 of DeRaDiff. No diffusion is in it.

Shapes: means (B, ...), a batch of B points. Variances and weights broadcast to the means: they are
numbers, (B, 1, ...) for one of each point, or masks over a point's elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weight = float | Tensor
"""The exponent of a Gaussian in a mixture: a number, or a tensor that broadcasts to the means.

With diagonal covariances the mixture is made element by element, so each may have its own weight.
"""


@dataclass(frozen=True)
class Gaussian:
    """N(mean, diag(variance)).

    Attributes:
        mean: (B, ...).
        variance: any shape that broadcasts to the mean's, often one number.
    """

    mean: Tensor
    variance: Tensor


def geometric_mixture(reference: Gaussian, anchor: Gaussian, lam: Weight) -> Gaussian:
    """reference^(1 - lam) anchor^lam, normalised (Corollary 1).

    Args:
        reference: the Gaussian at lam = 0.
        anchor: the Gaussian at lam = 1.
        lam: a number, (B, 1, ...) for one of each point, or a mask over a point's elements.

    Returns:
        The mixture: its precision, and its mean times its precision, are interpolated.

    Raises:
        ValueError: where the product cannot be normalised. It can happen for lam > 1 and unequal
            variances.
    """
    return weighted_mixture([reference, anchor], [1 - lam, lam])


def weighted_mixture(models: Sequence[Gaussian], weights: Sequence[Weight]) -> Gaussian:
    """prod p_i^(w_i), normalised (Theorem 1; several anchors: appendix A.4).

        precision  P = sum w_i / v_i
        mean         = (sum w_i mean_i / v_i) / P
        variance     = 1 / P

    All variances are taken relative to the smallest, so that the limits hold:

    - Equal variances, also if they are all 0 (a sampler's last step): the variance stays, and the
      means are averaged by weight.
    - One variance of 0: that model wins.
    - A weight of 0: that model counts for nothing, whatever its variance.

    Args:
        models: the Gaussians p_i.
        weights: w_i, one for each model. They sum to 1: w_0 = 1 - sum lam_i for the reference, and
            lam_i for the anchors.

    Raises:
        ValueError: for P <= 0, and for weights that do not sum to 1.
    """
    _check_sum(weights)
    models, weights = _without_zeros(models, weights)

    # Precisions in units of 1 / smallest.
    precisions, smallest = _relative_precisions(models, weights)
    total = torch.stack(precisions).sum(0)
    if total.min() <= 0:
        raise ValueError(_not_normalisable(models, weights, int(total.argmin()), total.shape))

    mean = sum(p * model.mean for p, model in zip(precisions, models)) / total
    return Gaussian(mean, smallest / total)


def log_normaliser(models: Sequence[Gaussian], weights: Sequence[Weight]) -> Tensor:
    """ln of the integral of prod p_i(x)^(w_i) over x.

    With P and mean of `weighted_mixture`, and a sum over the elements of a point:

        -1/2 sum [ sum_i w_i ln v_i + ln P + sum_i w_i (mean_i - mean)^2 / v_i ]

    For two models of equal variance v this is -1/2 lam (1 - lam) |mean_a - mean_ref|^2 / v.

    Args:
        models: the Gaussians p_i, with positive variances.
        weights: w_i, one for each model. They sum to 1.

    Returns:
        (B,), in nats.

    Raises:
        ValueError: see `weighted_mixture`.
    """
    mixture = weighted_mixture(models, weights)
    log_variances = sum(w * model.variance.log() for w, model in zip(weights, models))
    log_variances = log_variances - mixture.variance.log()
    distances = sum(
        w * (model.mean - mixture.mean).square() / model.variance
        for w, model in zip(weights, models)
    )
    return -0.5 * (log_variances + distances).flatten(1).sum(1)


def kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q).

    Args:
        p: with positive variances.
        q: with positive variances.

    Returns:
        (B,), in nats.
    """
    ratio = p.variance / q.variance
    distance = (p.mean - q.mean).square() / q.variance
    return 0.5 * (ratio - 1 - ratio.log() + distance).flatten(1).sum(1)


def _without_zeros(
    models: Sequence[Gaussian], weights: Sequence[Weight]
) -> tuple[list[Gaussian], list[Weight]]:
    """The models whose weight is not the number 0, and their weights."""
    is_used = [isinstance(weight, Tensor) or weight != 0 for weight in weights]
    used_models = [model for model, used in zip(models, is_used) if used]
    used_weights = [weight for weight, used in zip(weights, is_used) if used]
    return used_models, used_weights


def _relative_precisions(
    models: Sequence[Gaussian], weights: Sequence[Weight]
) -> tuple[list[Tensor], Tensor]:
    """w_i v_min / v_i of each model, and v_min.

    v_min is the smallest variance of the models that have a weight there. Where v_i is v_min, the
    ratio is 1 even if both are 0.
    """
    variances = [model.variance for model in models]
    device = models[0].mean.device
    parts = [torch.as_tensor(weight, device=device) for weight in weights]

    # A model without weight at an element must not be the smallest there.
    if any(part.ndim for part in parts):
        shapes = [tensor.shape for tensor in (*variances, *parts)]
        shape = torch.broadcast_shapes(*shapes)
        for i, part in enumerate(parts):
            variances[i] = torch.where(part == 0, torch.inf, variances[i]).expand(shape)

    variances = list(torch.broadcast_tensors(*variances))
    smallest = torch.stack(variances).amin(0)
    precisions = []
    for weight, variance in zip(weights, variances):
        ratio = torch.where(variance == smallest, torch.ones_like(variance), smallest / variance)
        precisions.append(weight * ratio)
    return precisions, smallest


def _check_sum(weights: Sequence[Weight]) -> None:
    """Raise ValueError for weights that do not sum to 1, within their precision."""
    total = torch.as_tensor(sum(weights))
    is_single = any(isinstance(w, Tensor) and w.dtype != torch.float64 for w in weights)
    tolerance = 1e-5 if is_single else 1e-9
    if (total - 1).abs().max() > tolerance:
        raise ValueError(
            f"the weights of a mixture must sum to 1, and {list(weights)} sum to "
            f"{total.flatten()[0].item():.6g}"
        )


def _not_normalisable(
    models: Sequence[Gaussian], weights: Sequence[Weight], element: int, shape: torch.Size
) -> str:
    """The message for the element whose precision is the lowest.

    Args:
        models: with a weight.
        weights: of the models.
        element: its number in a flattened tensor of `shape`.
        shape: that variances and weights broadcast to.
    """

    def at_element(value: Weight) -> float:
        return torch.as_tensor(value).expand(shape).flatten()[element].item()

    own_weights = [at_element(weight) for weight in weights]
    variances = ", ".join(f"{at_element(model.variance):.6g}" for model in models)
    lam = own_weights[-1]
    if len(models) > 2 or lam <= 1:
        return (
            f"no normalisable mixture of variances {variances} with weights {own_weights}: its "
            "precision is not positive"
        )
    return (
        f"no normalisable mixture at lam={lam:.6g} of variances {variances} (reference, anchor): "
        f"lam > 1 needs anchor variance / reference variance < lam / (lam - 1) = "
        f"{lam / (lam - 1):.6g}"
    )
