"""The mixture's closed forms against numeric integration, and its limits."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from deradiff.method.gaussian import (
    Gaussian,
    geometric_mixture,
    kl,
    log_normaliser,
    weighted_mixture,
)

X = torch.linspace(-60, 60, 240_001, dtype=torch.float64)


def gaussian(mean: float, variance: float) -> Gaussian:
    return Gaussian(
        torch.tensor([[mean]], dtype=torch.float64), torch.tensor(variance, dtype=torch.float64)
    )


def by_quadrature(models: list[Gaussian], weights: list[float]) -> tuple[float, float, float]:
    """log normaliser, mean and variance of prod p_i^(w_i), by the trapezoid rule over a wide
    line."""
    log_p = sum(
        w * Normal(g.mean.squeeze(), g.variance.sqrt()).log_prob(X) for w, g in zip(weights, models)
    )
    total = torch.trapezoid(log_p.exp(), X)
    mean = torch.trapezoid(log_p.exp() * X, X) / total
    return (
        total.log().item(),
        mean.item(),
        (torch.trapezoid(log_p.exp() * (X - mean) ** 2, X) / total).item(),
    )


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
    assert geometric_mixture(reference, anchor, 0.3) == weighted_mixture(
        [reference, anchor], [0.7, 0.3]
    )
    for lam, end in ((0.0, reference), (1.0, anchor)):
        mixture = geometric_mixture(reference, anchor, lam)
        assert torch.equal(mixture.mean, end.mean) and torch.equal(mixture.variance, end.variance)


def test_equal_variances_average_the_means_also_at_zero():
    for variance in (0.0, 1e-300, 0.4):
        mixture = geometric_mixture(gaussian(1.0, variance), gaussian(2.0, variance), 2.5)
        assert mixture.mean.item() == pytest.approx(3.5) and mixture.variance.item() == variance


def test_log_normaliser_of_equal_variances_is_the_short_formula():
    reference = Gaussian(
        torch.randn(4, 3, 2, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    )
    anchor = Gaussian(torch.randn(4, 3, 2, dtype=torch.float64), reference.variance)
    short = -0.5 * 0.3 * 0.7 * (anchor.mean - reference.mean).square().flatten(1).sum(1) / 0.7
    torch.testing.assert_close(log_normaliser([reference, anchor], [0.7, 0.3]), short)


def test_a_single_vanishing_variance_wins():
    assert geometric_mixture(gaussian(1.0, 0.0), gaussian(2.0, 1.0), 0.9).mean.item() == 1.0
    assert geometric_mixture(gaussian(1.0, 1.0), gaussian(2.0, 0.0), 0.1).mean.item() == 2.0
    assert (
        geometric_mixture(gaussian(1.0, 1.0), gaussian(2.0, 0.0), 0.0).mean.item() == 1.0
    )  # but not without any weight


def test_both_variances_vanishing_keep_their_ratio():
    lam, c = 0.3, 4.0
    mixture = geometric_mixture(gaussian(1.0, 4e-200), gaussian(2.0, 1e-200), lam)
    assert mixture.mean.item() == pytest.approx(
        ((1 - lam) * 1.0 + lam * c * 2.0) / ((1 - lam) + lam * c)
    )


def test_what_cannot_be_normalised_is_refused_with_the_condition():
    bound = r"at lam=3 of variances 1, 1.5 .*< lam / \(lam - 1\) = 1.5"
    with pytest.raises(ValueError, match=bound):
        geometric_mixture(gaussian(0.0, 1.0), gaussian(1.0, 1.5), 3)
    geometric_mixture(gaussian(0.0, 1.0), gaussian(1.0, 1.49), 3)
    with pytest.raises(ValueError, match="lam > 1 needs"):
        geometric_mixture(gaussian(0.0, 0.0), gaussian(1.0, 1.0), 2)
    with pytest.raises(ValueError, match="precision is not positive"):
        weighted_mixture(
            [gaussian(0.0, 0.1), gaussian(1.0, 1.0), gaussian(1.0, 1.0)], [-1.0, 1.0, 1.0]
        )
    with pytest.raises(ValueError, match="must sum to 1"):
        weighted_mixture([gaussian(0.0, 1.0), gaussian(1.0, 1.0)], [0.5, 0.6])


def test_kl_equals_torch_summed_over_dimensions():
    p = Gaussian(torch.randn(4, 3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    q = Gaussian(torch.randn(4, 3, dtype=torch.float64), torch.tensor(1.9, dtype=torch.float64))
    expected = kl_divergence(
        Normal(p.mean, p.variance.sqrt()), Normal(q.mean, q.variance.sqrt())
    ).sum(1)
    torch.testing.assert_close(kl(p, q), expected)


def test_weights_may_differ_between_points_and_between_elements():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 2, 4, 5, 5, generator=generator, dtype=torch.float64)
    variances = torch.rand(3, 2, 4, 5, 5, generator=generator, dtype=torch.float64) + 0.5
    models = [Gaussian(m, v) for m, v in zip(means, variances)]
    mask = torch.rand(5, 5, generator=generator, dtype=torch.float64)
    mask[0, 0], mask[1, 1] = 0.0, 1.0
    per_point = torch.tensor([0.2, 0.7], dtype=torch.float64).view(2, 1, 1, 1)
    for lam in (mask, per_point):
        whole = geometric_mixture(*models[:2], lam)
        for i, j, h, w in ((0, 1, 0, 0), (1, 2, 1, 1), (0, 3, 2, 4)):
            alone = [Gaussian(g.mean[i, j, h, w], g.variance[i, j, h, w]) for g in models[:2]]
            expected = geometric_mixture(*alone, lam.expand(2, 4, 5, 5)[i, j, h, w].item())
            assert whole.mean[i, j, h, w].item() == pytest.approx(expected.mean.item(), abs=1e-12)
            assert whole.variance[i, j, h, w].item() == pytest.approx(
                expected.variance.item(), abs=1e-12
            )
    three = weighted_mixture(models, [1 - 0.5 * mask - per_point, 0.5 * mask, per_point])
    alone = [Gaussian(g.mean[0, 0, 2, 4], g.variance[0, 0, 2, 4]) for g in models]
    weight = 0.5 * mask[2, 4].item()
    assert three.mean[0, 0, 2, 4].item() == pytest.approx(
        weighted_mixture(alone, [0.8 - weight, weight, 0.2]).mean.item(), abs=1e-12
    )


def test_a_mask_chooses_where_each_model_is_taken_as_it_is():
    reference, anchor = (Gaussian(torch.randn(1, 2, 2), torch.rand(1, 2, 2)) for _ in range(2))
    mask = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    mixture = geometric_mixture(reference, anchor, mask)
    assert torch.equal(mixture.mean, torch.where(mask == 1, anchor.mean, reference.mean))
    assert torch.equal(
        mixture.variance, torch.where(mask == 1, anchor.variance, reference.variance)
    )


def test_a_model_without_weight_does_not_win_by_its_vanishing_variance():
    reference, anchor = gaussian(1.0, 0.0), gaussian(2.0, 0.3)
    mixture = geometric_mixture(reference, anchor, torch.tensor([[1.0]]))
    assert mixture.mean.item() == 2 and mixture.variance.item() == pytest.approx(0.3)
    assert geometric_mixture(reference, anchor, torch.tensor([[0.9]])).mean.item() == 1


def test_equal_vanishing_variances_average_the_means_by_a_mask():
    mixture = geometric_mixture(
        gaussian(1.0, 0.0), gaussian(2.0, 0.0), torch.tensor([[0.0, 0.5, 2.0]])
    )
    assert mixture.mean.tolist() == [[1.0, 1.5, 3.0]] and mixture.variance.eq(0).all()


def test_the_element_that_cannot_be_normalised_is_named():
    reference, anchor = (
        Gaussian(torch.zeros(1, 3), torch.tensor([1.0, 1.0, 2.0])),
        Gaussian(torch.ones(1, 3), torch.tensor([1.0, 1.5, 2.0])),
    )
    with pytest.raises(ValueError, match=r"at lam=3 of variances 1, 1.5 "):
        geometric_mixture(reference, anchor, torch.tensor([[1.0, 3.0, 0.5]]))


def test_log_normaliser_with_weights_per_element_is_the_sum_over_elements():
    models = [
        Gaussian(torch.randn(2, 3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5)
        for _ in range(2)
    ]
    lam = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    parts = [
        log_normaliser(
            [Gaussian(g.mean[:, i : i + 1], g.variance[i]) for g in models],
            [1 - lam[i].item(), lam[i].item()],
        )
        for i in range(3)
    ]
    torch.testing.assert_close(log_normaliser(models, [1 - lam, lam]), sum(parts))
