"""The loss against an evaluation of its own, in float64 and plain numpy, and the conventions of beta."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from deradiff.training.dpo import dpo_loss, dpo_terms, kl_strength, learning_rate
from deradiff.training.noising import Flow, noising_of

BETA = 700.0


def errors(pred, target):
    return np.mean((pred - target) ** 2, axis=(2, 3, 4))


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_parity_with_an_independent_float64_evaluation(outputs):
    pred, reference, target = outputs
    pred = reference + 0.05 * pred  # margins of both signs, none saturated
    terms = dpo_loss(pred, reference, target, BETA)
    policy, frozen = errors(pred.numpy(), target.numpy()), errors(reference.numpy(), target.numpy())
    # Wallace et al. 2023, Eq. 14, read off the paper: the winner's gain over the reference less the loser's
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
    towards = ((target - reference) * -pred.grad).sum(dim=(1, 2, 3, 4))
    assert towards[0] > 0 > towards[1]
    # at step 0: d loss / d pred = beta/4 * 2 (pred - target) / (B * elements), from sigmoid(0) = 1/2
    expected = BETA / 4 * 2 * (reference - target)[0] / (5 * 36)
    torch.testing.assert_close(pred.grad[0], expected, rtol=1e-5, atol=1e-9)


def test_step_zero_is_ln_two_and_ties_count_half(outputs):
    _, reference, target = outputs
    terms = dpo_loss(reference, reference, target, BETA)
    assert terms.loss.item() == pytest.approx(math.log(2)) and terms.accuracy.item() == 0.5


def test_the_mean_is_taken_after_the_logarithm():
    target = torch.zeros(2, 2, 1, 1, 1)
    pred = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).reshape(
        2, 2, 1, 1, 1
    )  # margins +3 and -3: their mean is 0
    terms = dpo_loss(pred, torch.full_like(pred, 0.5**0.5), target, 6.0)
    assert terms.margin.tolist() == pytest.approx([3.0, -3.0])
    assert terms.loss.item() == pytest.approx(
        (math.log1p(math.exp(-3)) + math.log1p(math.exp(3))) / 2
    )


def test_winner_and_loser_share_noise_and_timestep():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents, noise, t = (
        torch.randn(2, 3, 4, 2, 2),
        torch.randn(3, 4, 2, 2),
        torch.tensor([0, 400, 999]),
    )
    noisy, target = noising_of(scheduler)(latents, noise, t)
    root = scheduler.alphas_cumprod[t].sqrt().reshape(3, 1, 1, 1)
    rest = (1 - scheduler.alphas_cumprod[t]).sqrt().reshape(3, 1, 1, 1)
    for side in (0, 1):
        torch.testing.assert_close(noisy[side], root * latents[side] + rest * noise)
        assert torch.equal(target[side], noise)


def test_velocity_target():
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    latents, noise, t = (
        torch.randn(2, 3, 4, 2, 2),
        torch.randn(3, 4, 2, 2),
        torch.tensor([1, 400, 999]),
    )
    _, target = noising_of(scheduler)(latents, noise, t)
    alpha = scheduler.alphas_cumprod[t].reshape(3, 1, 1, 1)
    torch.testing.assert_close(target[1], alpha.sqrt() * noise - (1 - alpha).sqrt() * latents[1])


@pytest.mark.parametrize(
    "beta, elements, expected", [(2000, 4 * 64 * 64, 0.0094), (5000, 4 * 128 * 128, 0.0058)]
)
def test_kl_strength_of_the_published_betas(beta, elements, expected):
    noising = noising_of(
        DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    )
    assert kl_strength(beta, elements, noising) == pytest.approx(expected, abs=5e-5)


def test_stored_errors_give_the_loss_of_the_outputs_they_were_taken_from(outputs):
    pred, reference, target = outputs
    terms = dpo_loss(pred, reference, target, BETA)
    again = dpo_terms(terms.error, terms.reference_error, BETA)
    assert torch.equal(terms.loss, again.loss) and torch.equal(terms.losses.mean(), terms.loss)
    assert torch.equal(terms.accuracies, (terms.margin > 0).float())


def test_a_flow_is_a_straight_line_and_its_target_the_velocity_along_it():
    flow = noising_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert isinstance(flow, Flow)
    latents, noise, t = (
        torch.randn(2, 3, 4, 2, 2),
        torch.randn(3, 4, 2, 2),
        torch.tensor([1.0, 400.0, 1000.0]),
    )
    noisy, target = flow(latents, noise, t)
    for side in (0, 1):
        for i, time in enumerate((0.001, 0.4, 1.0)):
            torch.testing.assert_close(
                noisy[side, i], (1 - time) * latents[side, i] + time * noise[i]
            )
            torch.testing.assert_close(
                noisy[side, i] - time * target[side, i], latents[side, i], atol=1e-5, rtol=1e-5
            )  # back to data
    assert torch.equal(flow.time(t), t / 1000)


@pytest.mark.parametrize("shift, dynamic", [(3.0, False), (3.0, True), (1.0, False)])
def test_flow_times_are_drawn_as_the_published_trainers_draw_them(shift, dynamic):
    from diffusers.training_utils import compute_density_for_timestep_sampling

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([noising_of(scheduler).draw(generator) for _ in range(4000)])
    u = compute_density_for_timestep_sampling(
        "logit_normal", 200_000, 0.0, 1.0, generator=torch.Generator().manual_seed(1)
    )
    published = scheduler.timesteps[(u * 1000).long()]
    levels = torch.linspace(0.02, 0.98, 25)
    assert (drawn.quantile(levels) - published.quantile(levels)).abs().max() < 25  # of 1000


def test_kl_strength_of_a_flow_counts_each_step_as_the_transitions_do():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = scheduler.sigmas.double()[:1000].numpy()
    steps = np.log(t[:-1] / t[1:]) - (
        t[:-1] - t[1:]
    )  # method.md section 4: |D_v|^2 of one step in nats
    assert noising_of(scheduler).kl_weight == pytest.approx(2 * steps.sum(), rel=1e-5)


def test_what_predicts_neither_noise_nor_velocity_is_refused():
    with pytest.raises(ValueError, match="predicts sample cannot be trained"):
        noising_of(DDPMScheduler(prediction_type="sample"))


def test_learning_rate_rules():
    assert learning_rate(1e-8, "fixed", 5000, 2048) == pytest.approx(2.048e-5)
    assert learning_rate(1e-8, "inverse_beta", 5000, 2048) == pytest.approx(2.048e-5 * 0.4)
    with pytest.raises(ValueError, match="inverse_beta or fixed"):
        learning_rate(1e-8, "linear", 5000)
