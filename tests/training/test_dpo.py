"""The loss against an evaluation of its own in float64, and the conventions of beta."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from deradiff.training.dpo import dpo_loss, dpo_terms, kl_strength, learning_rate
from deradiff.training.noising import noising_of

BETA = 700.0


def errors(pred, target):
    return np.mean((pred - target) ** 2, axis=(2, 3, 4))


@pytest.fixture
def outputs():
    """Outputs of the trained network, outputs of the reference, and targets, (2, 5, 4, 3, 3)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_parity_with_an_independent_float64_evaluation(outputs):
    pred, reference, target = outputs
    pred = reference + 0.05 * pred  # margins of both signs, none saturated
    terms = dpo_loss(pred, reference, target, BETA)
    policy = errors(pred.numpy(), target.numpy())
    frozen = errors(reference.numpy(), target.numpy())

    # Wallace et al. 2023, Eq. 14, as the paper has it: the winner's gain over the reference, less
    # the loser's.
    gain = (frozen[0] - policy[0]) - (frozen[1] - policy[1])
    expected = np.mean(np.log1p(np.exp(-(BETA / 2) * gain)))
    assert terms.loss.item() == pytest.approx(expected, rel=1e-5)
    assert terms.accuracy.item() == pytest.approx(np.mean(gain > 0))
    np.testing.assert_allclose(terms.margin.numpy(), BETA / 2 * gain, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(terms.error.numpy(), policy, rtol=1e-6)


def test_gradient_moves_the_winner_towards_its_target_and_the_loser_away(outputs):
    _, reference, target = outputs
    pred = reference.clone().requires_grad_()
    dpo_loss(pred, reference, target, BETA).loss.backward()
    towards_target = ((target - reference) * -pred.grad).sum(dim=(1, 2, 3, 4))
    assert towards_target[0] > 0 > towards_target[1]
    # At step 0, from sigmoid(0) = 1/2: d loss / d pred = beta/4 * 2 (pred - target) / (B * C H W).
    expected = BETA / 4 * 2 * (reference - target)[0] / (5 * 36)
    torch.testing.assert_close(pred.grad[0], expected, rtol=1e-5, atol=1e-9)


def test_step_zero_is_ln_two_and_ties_count_half(outputs):
    _, reference, target = outputs
    terms = dpo_loss(reference, reference, target, BETA)
    assert terms.loss.item() == pytest.approx(math.log(2))
    assert terms.accuracy.item() == 0.5


def test_the_mean_is_taken_after_the_logarithm():
    target = torch.zeros(2, 2, 1, 1, 1)
    pred = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).reshape(2, 2, 1, 1, 1)
    reference = torch.full_like(pred, 0.5**0.5)
    terms = dpo_loss(pred, reference, target, 6.0)
    assert terms.margin.tolist() == pytest.approx([3.0, -3.0])  # their mean is 0
    expected = (math.log1p(math.exp(-3)) + math.log1p(math.exp(3))) / 2
    assert terms.loss.item() == pytest.approx(expected)


def test_stored_errors_give_the_loss_of_the_outputs_they_were_taken_from(outputs):
    pred, reference, target = outputs
    terms = dpo_loss(pred, reference, target, BETA)
    again = dpo_terms(terms.error, terms.reference_error, BETA)
    assert torch.equal(terms.loss, again.loss)
    assert torch.equal(terms.losses.mean(), terms.loss)
    assert torch.equal(terms.accuracies, (terms.margin > 0).float())


@pytest.mark.parametrize(
    "beta, elements, expected", [(2000, 4 * 64 * 64, 0.0094), (5000, 4 * 128 * 128, 0.0058)]
)
def test_kl_strength_of_the_published_betas(beta, elements, expected):
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    strength = kl_strength(beta, elements, noising_of(scheduler))
    assert strength == pytest.approx(expected, abs=5e-5)


def test_learning_rate_rules():
    assert learning_rate(1e-8, "fixed", 5000, 2048) == pytest.approx(2.048e-5)
    assert learning_rate(1e-8, "inverse_beta", 5000, 2048) == pytest.approx(2.048e-5 * 0.4)
    with pytest.raises(ValueError, match="inverse_beta or fixed"):
        learning_rate(1e-8, "linear", 5000)
