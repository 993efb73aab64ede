"""The mixture's closed forms against numeric integration, and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from deradiff.method.gaussian import (
    Gaussian,
    geometric_mixture,
    kl,
    log_normaliser,
    weighted_mixture,
)

X = torch.linspace(-60, 60, 240_001, dtype=torch.float64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def gaussian(mean: float, variance: float) -> Gaussian:
    """On the line: a batch of one point of one element."""
    return Gaussian(number(mean).view(1, 1), number(variance))


def by_quadrature(models: list[Gaussian], weights: list[float]) -> tuple[float, float, float]:
    """ln of the normaliser, mean and variance of prod p_i^(w_i), by the trapezoid rule."""
    log_p = torch.zeros_like(X)
    for weight, model in zip(weights, models):
        log_p += weight * Normal(model.mean.squeeze(), model.variance.sqrt()).log_prob(X)
    p = log_p.exp()
    total = torch.trapezoid(p, X)
    mean = torch.trapezoid(p * X, X) / total
    variance = torch.trapezoid(p * (X - mean) ** 2, X) / total
    return total.log().item(), mean.item(), variance.item()


# (mean, variance) of each model, and the weights.
CASES = [
    ([(-1.0, 0.5), (2.0, 2.0)], [0.7, 0.3]),
    ([(-1.0, 0.5), (2.0, 2.0)], [0.2, 0.8]),
    # Beyond the anchor.
    ([(0.3, 2.0), (1.0, 0.7)], [-1.0, 2.0]),
    # Equal variances: any lam.
    ([(0.3, 1.3), (1.0, 1.3)], [-2.0, 3.0]),
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
    reference = gaussian(-1.0, 0.5)
    anchor = gaussian(2.0, 2.0)
    expected = weighted_mixture([reference, anchor], [0.7, 0.3])
    assert geometric_mixture(reference, anchor, 0.3) == expected
    for lam, end in ((0.0, reference), (1.0, anchor)):
        mixture = geometric_mixture(reference, anchor, lam)
        assert torch.equal(mixture.mean, end.mean)
        assert torch.equal(mixture.variance, end.variance)


def test_equal_variances_average_the_means_also_at_zero():
    for variance in (0.0, 1e-300, 0.4):
        mixture = geometric_mixture(gaussian(1.0, variance), gaussian(2.0, variance), 2.5)
        assert mixture.mean.item() == pytest.approx(3.5)
        assert mixture.variance.item() == variance


def test_log_normaliser_of_equal_variances_is_the_short_formula():
    variance = 0.7
    reference = Gaussian(torch.randn(4, 3, 2, dtype=torch.float64), number(variance))
    anchor = Gaussian(torch.randn(4, 3, 2, dtype=torch.float64), number(variance))
    squared_distance = (anchor.mean - reference.mean).square().flatten(1).sum(1)
    short = -0.5 * 0.3 * 0.7 * squared_distance / variance
    torch.testing.assert_close(log_normaliser([reference, anchor], [0.7, 0.3]), short)


def test_a_single_vanishing_variance_wins():
    certain_reference = geometric_mixture(gaussian(1.0, 0.0), gaussian(2.0, 1.0), 0.9)
    assert certain_reference.mean.item() == 1.0
    certain_anchor = geometric_mixture(gaussian(1.0, 1.0), gaussian(2.0, 0.0), 0.1)
    assert certain_anchor.mean.item() == 2.0
    without_weight = geometric_mixture(gaussian(1.0, 1.0), gaussian(2.0, 0.0), 0.0)
    assert without_weight.mean.item() == 1.0


def test_both_variances_vanishing_keep_their_ratio():
    lam = 0.3
    ratio = 4.0
    mixture = geometric_mixture(gaussian(1.0, 4e-200), gaussian(2.0, 1e-200), lam)
    expected = ((1 - lam) * 1.0 + lam * ratio * 2.0) / ((1 - lam) + lam * ratio)
    assert mixture.mean.item() == pytest.approx(expected)


def test_what_cannot_be_normalised_is_refused_with_the_condition():
    bound = r"at lam=3 of variances 1, 1.5 .*< lam / \(lam - 1\) = 1.5"
    with pytest.raises(ValueError, match=bound):
        geometric_mixture(gaussian(0.0, 1.0), gaussian(1.0, 1.5), 3)
    geometric_mixture(gaussian(0.0, 1.0), gaussian(1.0, 1.49), 3)
    with pytest.raises(ValueError, match="lam > 1 needs"):
        geometric_mixture(gaussian(0.0, 0.0), gaussian(1.0, 1.0), 2)
    with pytest.raises(ValueError, match="precision is not positive"):
        models = [gaussian(0.0, 0.1), gaussian(1.0, 1.0), gaussian(1.0, 1.0)]
        weighted_mixture(models, [-1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="must sum to 1"):
        weighted_mixture([gaussian(0.0, 1.0), gaussian(1.0, 1.0)], [0.5, 0.6])


def test_kl_equals_torch_summed_over_dimensions():
    p = Gaussian(torch.randn(4, 3, dtype=torch.float64), number(0.7))
    q = Gaussian(torch.randn(4, 3, dtype=torch.float64), number(1.9))
    normal_p = Normal(p.mean, p.variance.sqrt())
    normal_q = Normal(q.mean, q.variance.sqrt())
    torch.testing.assert_close(kl(p, q), kl_divergence(normal_p, normal_q).sum(1))


def at(model: Gaussian, element: tuple[int, ...]) -> Gaussian:
    """One element of one point."""
    return Gaussian(model.mean[element], model.variance[element])


def test_weights_may_differ_between_points_and_between_elements():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 2, 4, 5, 5, generator=generator, dtype=torch.float64)
    variances = torch.rand(3, 2, 4, 5, 5, generator=generator, dtype=torch.float64) + 0.5
    models = [Gaussian(mean, variance) for mean, variance in zip(means, variances)]
    reference, anchor, _ = models
    mask = torch.rand(5, 5, generator=generator, dtype=torch.float64)
    mask[0, 0] = 0.0
    mask[1, 1] = 1.0
    per_point = torch.tensor([0.2, 0.7], dtype=torch.float64).view(2, 1, 1, 1)

    # Two models: each element is a mixture of its own.
    for lam in (mask, per_point):
        whole = geometric_mixture(reference, anchor, lam)
        for element in ((0, 1, 0, 0), (1, 2, 1, 1), (0, 3, 2, 4)):
            own_lam = lam.expand(2, 4, 5, 5)[element].item()
            expected = geometric_mixture(at(reference, element), at(anchor, element), own_lam)
            mixed = at(whole, element)
            assert mixed.mean.item() == pytest.approx(expected.mean.item(), abs=1e-12)
            assert mixed.variance.item() == pytest.approx(expected.variance.item(), abs=1e-12)

    # Three models, with a mask and a number for each point at once.
    three = weighted_mixture(models, [1 - 0.5 * mask - per_point, 0.5 * mask, per_point])
    element = (0, 0, 2, 4)
    weight = 0.5 * mask[2, 4].item()
    alone = [at(model, element) for model in models]
    expected = weighted_mixture(alone, [0.8 - weight, weight, 0.2])
    assert three.mean[element].item() == pytest.approx(expected.mean.item(), abs=1e-12)


def test_a_mask_chooses_where_each_model_is_taken_as_it_is():
    reference = Gaussian(torch.randn(1, 2, 2), torch.rand(1, 2, 2))
    anchor = Gaussian(torch.randn(1, 2, 2), torch.rand(1, 2, 2))
    mask = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    mixture = geometric_mixture(reference, anchor, mask)
    assert torch.equal(mixture.mean, torch.where(mask == 1, anchor.mean, reference.mean))
    variance = torch.where(mask == 1, anchor.variance, reference.variance)
    assert torch.equal(mixture.variance, variance)


def test_a_model_without_weight_does_not_win_by_its_vanishing_variance():
    reference = gaussian(1.0, 0.0)
    anchor = gaussian(2.0, 0.3)
    mixture = geometric_mixture(reference, anchor, torch.tensor([[1.0]]))
    assert mixture.mean.item() == 2
    assert mixture.variance.item() == pytest.approx(0.3)
    assert geometric_mixture(reference, anchor, torch.tensor([[0.9]])).mean.item() == 1


def test_equal_vanishing_variances_average_the_means_by_a_mask():
    mask = torch.tensor([[0.0, 0.5, 2.0]])
    mixture = geometric_mixture(gaussian(1.0, 0.0), gaussian(2.0, 0.0), mask)
    assert mixture.mean.tolist() == [[1.0, 1.5, 3.0]]
    assert mixture.variance.eq(0).all()


def test_the_element_that_cannot_be_normalised_is_named():
    reference = Gaussian(torch.zeros(1, 3), torch.tensor([1.0, 1.0, 2.0]))
    anchor = Gaussian(torch.ones(1, 3), torch.tensor([1.0, 1.5, 2.0]))
    with pytest.raises(ValueError, match=r"at lam=3 of variances 1, 1.5 "):
        geometric_mixture(reference, anchor, torch.tensor([[1.0, 3.0, 0.5]]))


def test_log_normaliser_with_weights_per_element_is_the_sum_over_elements():
    models = []
    for _ in range(2):
        mean = torch.randn(2, 3, dtype=torch.float64)
        variance = torch.rand(3, dtype=torch.float64) + 0.5
        models.append(Gaussian(mean, variance))
    lam = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    total = torch.zeros(2, dtype=torch.float64)
    for i, own_lam in enumerate(lam.tolist()):
        alone = [Gaussian(model.mean[:, i : i + 1], model.variance[i]) for model in models]
        total += log_normaliser(alone, [1 - own_lam, own_lam])
    torch.testing.assert_close(log_normaliser(models, [1 - lam, lam]), total)
