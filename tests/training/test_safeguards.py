"""The safeguard of Diffusion-SDPO against finite differences, and the winner's own error."""

import numpy as np
import pytest
import torch

from deradiff.training.dpo import dpo_terms, pair_error
from deradiff.training.safeguards import loser_scale, with_scaled_loser
from tests.support.objectives import items, make
from train.config import DPOConfig

BETA = 700.0
SHAPE = (4, 3, 3)


def planted(angles):
    """Outputs and targets (2, B, C, H, W), float64, of pairs whose errors are at given angles.

    The winner's error has length 1 and the loser's 2, so that <g_w, g_l> is 2 cos(angle).
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(len(angles), np.prod(SHAPE), generator=generator, dtype=torch.float64)
    other = torch.randn(len(angles), np.prod(SHAPE), generator=generator, dtype=torch.float64)
    first = first / first.norm(dim=1, keepdim=True)
    other = other - (other * first).sum(1, keepdim=True) * first
    other = other / other.norm(dim=1, keepdim=True)
    angle = torch.tensor(angles, dtype=torch.float64)[:, None]
    loser = 2 * (angle.cos() * first + angle.sin() * other)
    target = torch.randn(2, len(angles), *SHAPE, generator=generator, dtype=torch.float64)
    errors = torch.stack([first, loser]).reshape(2, len(angles), *SHAPE)
    return target + errors, target


def test_the_scale_is_one_unless_the_loser_pulls_the_winner_along():
    output, target = planted([0.0, np.pi / 3, 0.4, np.pi / 2, np.pi])
    # |g_w|^2 / <g_w, g_l> = 1 / (2 cos) where 2 cos > 1
    expected = [1 / 2, 1, 1 / (2 * np.cos(0.4)), 1, 1]
    assert loser_scale(output, target).tolist() == pytest.approx(expected, rel=1e-5)
    same = torch.zeros(2, 1, *SHAPE)
    assert loser_scale(same, same).item() == 1, "no error, no scale"


@pytest.mark.parametrize("is_guarded", [True, False])
def test_a_step_does_not_raise_the_winners_error(is_guarded):
    """By finite differences, where both outputs have the same Jacobian: a shift that they share."""
    output, target = planted([0.2])
    shift = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    shifted = output + shift
    error = pair_error(shifted, target)
    before = ((output - target) ** 2)[0].mean().item()
    if is_guarded:
        error = with_scaled_loser(error, loser_scale(shifted, target))
    dpo_terms(error, torch.zeros(2, 1), BETA).loss.backward()

    size = 1e-4
    step = -size * shift.grad / shift.grad.norm()
    after = ((output + step - target) ** 2)[0].mean().item()
    rise = (after - before) / size
    if is_guarded:
        assert abs(rise) < 1e-4, "first order: none, second order: of the size of the step"
    else:
        assert rise > 0.01, "the planted pair would do harm"


def test_the_loss_is_the_same_and_the_winners_gradient_too():
    output, target = planted([0.2, 2.0])
    gradients = []
    losses = []
    for is_guarded in (False, True):
        own = output.clone().requires_grad_()
        error = pair_error(own, target)
        if is_guarded:
            error = with_scaled_loser(error, loser_scale(own, target))
        loss = dpo_terms(error, torch.zeros(2, 2), BETA).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(own.grad)
    plain, guarded = gradients
    assert losses[0] == losses[1]
    assert torch.equal(plain[0], guarded[0]), "the winner's"
    scale = loser_scale(output, target)[:, None, None, None]
    torch.testing.assert_close(guarded[1], scale.double() * plain[1])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_objective_adds_them(pairs, method):
    losses = {}
    for name, options in {
        "plain": {},
        "safeguard": {"safeguard": True},
        "sft": {"sft": 0.5},
    }.items():
        _, objective = make("sd15", method, lora_scale=1.0, **options)
        batch = objective.collate(items(pairs))
        losses[name], terms = objective.loss(objective.network, batch)
        assert ("loser_scale" in terms) == (name == "safeguard")
        if name == "sft":
            winner = (terms["winner_vs_reference"] + _winner_of_reference(objective, batch)).mean()
    assert losses["safeguard"].item() == losses["plain"].item()
    expected = losses["plain"].item() + 0.5 * 500 / 2 * winner.item()
    assert losses["sft"].item() == pytest.approx(expected, rel=1e-4)


def _winner_of_reference(objective, batch):
    """The reference's errors on the winners."""
    latents, conditioning = objective.encoded(batch)
    noisy, target = objective.noising(latents, batch["noise"], batch["timesteps"])
    return objective.reference_error(batch, noisy, target, conditioning)[0]


def test_the_card_says_what_was_added():
    config = DPOConfig(safeguard=True, sft=0.5)
    assert config.additions == ["safeguard", "sft 0.5"] and DPOConfig().additions == []
    with pytest.raises(ValueError, match=r"dpo\.sft must be at least 0, not -1"):
        DPOConfig(sft=-1)
