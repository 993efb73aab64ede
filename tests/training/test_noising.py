"""The forward processes of training: noise schedules and flows."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.training_utils import compute_density_for_timestep_sampling

from deradiff.method.schedulers import make_scheduler
from deradiff.training.noising import Flow, noising_of


def pair_of_latents():
    """Latents (2, 3, 4, 2, 2) of three pairs, and their noise (3, 4, 2, 2)."""
    return torch.randn(2, 3, 4, 2, 2), torch.randn(3, 4, 2, 2)


def test_winner_and_loser_share_noise_and_timestep():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents, noise = pair_of_latents()
    timesteps = torch.tensor([0, 400, 999])
    noisy, target = noising_of(scheduler)(latents, noise, timesteps)
    signal = scheduler.alphas_cumprod[timesteps].reshape(3, 1, 1, 1)
    for image in (0, 1):
        expected = signal.sqrt() * latents[image] + (1 - signal).sqrt() * noise
        torch.testing.assert_close(noisy[image], expected)
        assert torch.equal(target[image], noise)


def test_velocity_target():
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    latents, noise = pair_of_latents()
    timesteps = torch.tensor([1, 400, 999])
    _, target = noising_of(scheduler)(latents, noise, timesteps)
    signal = scheduler.alphas_cumprod[timesteps].reshape(3, 1, 1, 1)
    expected = signal.sqrt() * noise - (1 - signal).sqrt() * latents[1]
    torch.testing.assert_close(target[1], expected)


def test_a_flow_is_a_straight_line_and_its_target_the_velocity_along_it():
    flow = noising_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert isinstance(flow, Flow)
    latents, noise = pair_of_latents()
    timesteps = torch.tensor([1.0, 400.0, 1000.0])
    noisy, target = flow(latents, noise, timesteps)
    for image in (0, 1):
        for i, time in enumerate((0.001, 0.4, 1.0)):
            expected = (1 - time) * latents[image, i] + time * noise[i]
            torch.testing.assert_close(noisy[image, i], expected)
            back = noisy[image, i] - time * target[image, i]
            torch.testing.assert_close(back, latents[image, i], atol=1e-5, rtol=1e-5)
    assert torch.equal(flow.time(timesteps), timesteps / 1000)


def test_a_solver_of_flows_has_its_shift_under_another_name():
    """Sana's own scheduler is DPM-Solver++: its `flow_shift` is flow Euler's `shift`."""
    solver = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    shifted = noising_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert noising_of(solver).key == shifted.key
    assert make_scheduler("flow_euler", solver.config).config.shift == 3.0
    assert make_scheduler("flow_euler", shifted.schedule.config).config.shift == 3.0


@pytest.mark.parametrize("shift, dynamic", [(3.0, False), (3.0, True), (1.0, False)])
def test_flow_times_are_drawn_as_the_published_trainers_draw_them(shift, dynamic):
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
    times = scheduler.sigmas.double()[:1000].numpy()
    # docs/method.md, the flow's particles: the factor of |v_anchor - v_ref|^2 in one step.
    steps = np.log(times[:-1] / times[1:]) - (times[:-1] - times[1:])
    assert noising_of(scheduler).kl_weight == pytest.approx(2 * steps.sum(), rel=1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(num_train_timesteps=20, prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=20, shift=3.0),
    ],
    ids=["diffusion", "flow"],
)
def test_shares_are_those_that_timesteps_are_drawn_by(scheduler):
    noising = noising_of(scheduler)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([noising.draw(generator) for _ in range(20_000)])
    assert float(noising.shares.sum()) == pytest.approx(1)
    for timestep, share in zip(noising.timesteps, noising.shares.tolist()):
        seen = float((drawn == timestep).double().mean())
        assert seen == pytest.approx(share, abs=4 * (share / 20_000) ** 0.5 + 1e-4)


def test_kl_of_a_step_is_the_same_whatever_the_network_predicts():
    """Two models that differ in x0 by 1: eps by sqrt(snr), v by 1 / sqrt(1 - abar) times that."""
    kinds = {}
    for prediction in ("epsilon", "v_prediction"):
        noising = noising_of(DDPMScheduler(prediction_type=prediction))
        signal = noising.schedule.alphas_cumprod.double()
        of_eps = signal / (1 - signal)
        of_v = 1 / (1 - signal)
        difference = of_eps if prediction == "epsilon" else of_v
        kinds[prediction] = noising.kl_weights * difference
    torch.testing.assert_close(kinds["v_prediction"], kinds["epsilon"])
    # The KL of all steps is half of the SNR's growth times that difference.
    snr = signal / (1 - signal)
    assert float(kinds["epsilon"].sum()) == pytest.approx(float(snr[0] - snr[-1]))


def test_what_predicts_neither_noise_nor_velocity_is_refused():
    with pytest.raises(ValueError, match="predicts sample cannot be trained"):
        noising_of(DDPMScheduler(prediction_type="sample"))
