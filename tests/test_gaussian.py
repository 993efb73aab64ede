"""The mixture's closed forms against numeric integration, and its limits."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from deradiff.gaussian import Gaussian, geometric_mixture, kl, log_normaliser, weighted_mixture

X = torch.linspace(-60, 60, 240_001, dtype=torch.float64)


def gaussian(mean: float, variance: float) -> Gaussian:
    return Gaussian(torch.tensor([[mean]], dtype=torch.float64), torch.tensor(variance, dtype=torch.float64))


def by_quadrature(models: list[Gaussian], weights: list[float]) -> tuple[float, float, float]:
    """log normaliser, mean and variance of prod p_i^(w_i), by the trapezoid rule over a wide line."""
    log_p = sum(w * Normal(g.mean.squeeze(), g.variance.sqrt()).log_prob(X) for w, g in zip(weights, models))
    total = torch.trapezoid(log_p.exp(), X)
    mean = torch.trapezoid(log_p.exp() * X, X) / total
    return total.log().item(), mean.item(), (torch.trapezoid(log_p.exp() * (X - mean) ** 2, X) / total).item()


CASES = [
    ([(-1.0, 0.5), (2.0, 2.0)], [0.7, 0.3]),
    ([(-1.0, 0.5), (2.0, 2.0)], [0.2, 0.8]),
    ([(0.3, 2.0), (1.0, 0.7)], [-1.0, 2.0]),  # beyond the anchor
    ([(0.3, 1.3), (1.0, 1.3)], [-2.0, 3.0]),  # equal variances: any lam
    ([(0.0, 1.0), (1.0, 0.5), (-2.0, 3.0)], [0.3, 0.5, 0.2]),
]


@pytest.mark.parametrize(("parameters", "weights"), CASES)
def test_mixture_and_its_normaliser_equal_quadrature(parameters, weights):
    models = [gaussian(*p) for p in parameters]
    log_z, mean, variance = by_quadrature(models, weights)
    mixture = weighted_mixture(models, weights)
    assert mixture.mean.item() == pytest.approx(mean, abs=1e-9)
    assert mixture.variance.item() == pytest.approx(variance, abs=1e-9)
    assert log_normaliser(models, weights).item() == pytest.approx(log_z, abs=1e-9)


def test_lam_is_the_anchors_weight():
    reference, anchor = gaussian(-1.0, 0.5), gaussian(2.0, 2.0)
    assert geometric_mixture(reference, anchor, 0.3) == weighted_mixture([reference, anchor], [0.7, 0.3])
    for lam, end in ((0.0, reference), (1.0, anchor)):
        mixture = geometric_mixture(reference, anchor, lam)
        assert torch.equal(mixture.mean, end.mean) and torch.equal(mixture.variance, end.variance)


def test_equal_variances_average_the_means_also_at_zero():
    for variance in (0.0, 1e-300, 0.4):
        mixture = geometric_mixture(gaussian(1.0, variance), gaussian(2.0, variance), 2.5)
        assert mixture.mean.item() == pytest.approx(3.5) and mixture.variance.item() == variance


def test_log_normaliser_of_equal_variances_is_the_short_formula():
    reference = Gaussian(torch.randn(4, 3, 2, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    anchor = Gaussian(torch.randn(4, 3, 2, dtype=torch.float64), reference.variance)
    short = -0.5 * 0.3 * 0.7 * (anchor.mean - reference.mean).square().flatten(1).sum(1) / 0.7
    torch.testing.assert_close(log_normaliser([reference, anchor], [0.7, 0.3]), short)


def test_a_single_vanishing_variance_wins():
    assert geometric_mixture(gaussian(1.0, 0.0), gaussian(2.0, 1.0), 0.9).mean.item() == 1.0
    assert geometric_mixture(gaussian(1.0, 1.0), gaussian(2.0, 0.0), 0.1).mean.item() == 2.0
    assert geometric_mixture(gaussian(1.0, 1.0), gaussian(2.0, 0.0), 0.0).mean.item() == 1.0  # but not without any weight


def test_both_variances_vanishing_keep_their_ratio():
    lam, c = 0.3, 4.0
    mixture = geometric_mixture(gaussian(1.0, 4e-200), gaussian(2.0, 1e-200), lam)
    assert mixture.mean.item() == pytest.approx(((1 - lam) * 1.0 + lam * c * 2.0) / ((1 - lam) + lam * c))


def test_what_cannot_be_normalised_is_refused_with_the_condition():
    bound = r"at lam=3 of variances 1, 1.5 .*< lam / \(lam - 1\) = 1.5"
    with pytest.raises(ValueError, match=bound):
        geometric_mixture(gaussian(0.0, 1.0), gaussian(1.0, 1.5), 3)
    geometric_mixture(gaussian(0.0, 1.0), gaussian(1.0, 1.49), 3)
    with pytest.raises(ValueError, match="lam > 1 needs"):
        geometric_mixture(gaussian(0.0, 0.0), gaussian(1.0, 1.0), 2)
    with pytest.raises(ValueError, match="precision is not positive"):
        weighted_mixture([gaussian(0.0, 0.1), gaussian(1.0, 1.0), gaussian(1.0, 1.0)], [-1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="must sum to 1"):
        weighted_mixture([gaussian(0.0, 1.0), gaussian(1.0, 1.0)], [0.5, 0.6])


def test_kl_equals_torch_summed_over_dimensions():
    p = Gaussian(torch.randn(4, 3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    q = Gaussian(torch.randn(4, 3, dtype=torch.float64), torch.tensor(1.9, dtype=torch.float64))
    expected = kl_divergence(Normal(p.mean, p.variance.sqrt()), Normal(q.mean, q.variance.sqrt())).sum(1)
    torch.testing.assert_close(kl(p, q), expected)
