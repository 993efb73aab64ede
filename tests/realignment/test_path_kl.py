"""What realignment costs: path KL against a sum by hand over the chain's own latents."""

import math

import pytest
import torch
from diffusers import PNDMScheduler

from deradiff.realignment.context import realign
from tests.support.realign_world import STEPS, World, sample


def path_kl_by_hand(
    world: World, method: str, lam: float, guidance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `dial.path_kl` of a call, and the same sum over its steps from both networks' outputs."""
    pipe = world.pipe
    scheduler = pipe.scheduler
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    latents = []

    def watch(_, step, t, values):
        latents.append(values["latents"])
        return values

    with realign(pipe, world.anchors[method], lam, path_kl=True) as dial:
        chain = {"latents": start.clone(), "callback_on_step_end": watch}
        sample(pipe, guidance_scale=guidance, **chain)
        path_kl = dial.path_kl

    # The same chain again: the input of each step, and what both networks say to it.
    anchor = world.stock(method).unet
    text, empty = pipe.encode_prompt(["prompt 0", "prompt 1"], "cpu", 1, True)
    times = scheduler.timesteps.clone()
    scheduler.set_timesteps(STEPS)
    bars = scheduler.alphas_cumprod[times.long()].double()
    snr = bars / (1 - bars)
    predicts_velocity = scheduler.config.prediction_type == "v_prediction"
    samples = [start * scheduler.init_noise_sigma, *latents]
    total = torch.zeros(2)
    for i, t in enumerate(times):
        x = scheduler.scale_model_input(samples[i], t)
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index += 1
        with torch.no_grad():
            difference = anchor(x, t, text).sample - pipe.unet(x, t, text).sample
            unconditional = anchor(x, t, empty).sample - pipe.unet(x, t, empty).sample
        if guidance > 1:
            difference = unconditional + guidance * (difference - unconditional)
        gain = math.log(snr[i + 1] / snr[i]) if i + 1 < len(times) else 1.0
        scale = bars[i] if predicts_velocity else 1.0
        total += 0.5 * lam**2 * gain * scale * difference.square().sum((1, 2, 3))
    return path_kl, total


@pytest.mark.parametrize(("lam", "guidance"), [(0.6, 3.0), (1.0, 1.0)])
@pytest.mark.parametrize(
    ("sampler", "prediction"), [("ddim", "epsilon"), ("ddim", "v_prediction"), ("euler", "epsilon")]
)
def test_path_kl_is_the_sum_over_the_chain(sd15, sampler, prediction, lam, guidance):
    sd15.use_sampler(sampler, prediction_type=prediction, timestep_spacing="leading")
    path_kl, by_hand = path_kl_by_hand(sd15, "full1", lam, guidance)
    assert path_kl.shape == (2,)
    assert (path_kl > 0).all()
    torch.testing.assert_close(path_kl, by_hand, rtol=2e-4, atol=0)


def test_path_kl_is_of_the_last_call_an_image_each(sd15):
    with realign(sd15.pipe, sd15.anchors["full1"], lam=0.5) as dial:
        assert dial.path_kl.shape == (0,)
        sample(sd15.pipe, (0, 1))
        first = dial.path_kl
        sample(sd15.pipe, (0, 1), num_images_per_prompt=2)
        assert dial.path_kl.shape == (4,)
        sample(sd15.pipe, (0, 1))
        assert torch.equal(dial.path_kl, first)

        alone = []
        for seed in (0, 1):
            sample(sd15.pipe, (seed,))
            alone.append(dial.path_kl)
        torch.testing.assert_close(torch.cat(alone), first, rtol=1e-4, atol=0)

        dial.lam = 0
        sample(sd15.pipe)
        assert dial.path_kl.tolist() == [0.0, 0.0]
        dial.lam = 1
        sample(sd15.pipe)
        assert dial.path_kl.isnan().all(), "the reference was not evaluated"


def test_path_kl_counts_repeated_timesteps_once_and_strays_never(sd15):
    """PNDM, SD1.5's own scheduler, visits its second timestep twice."""
    sd15.pipe.scheduler = PNDMScheduler.from_config(sd15.pipe.scheduler.config, skip_prk_steps=True)
    with realign(sd15.pipe, sd15.anchors["full1"], lam=0.5) as dial:
        sample(sd15.pipe)
        assert len(sd15.pipe.scheduler.timesteps) == STEPS + 1
        first = dial.path_kl
        # A call at a time that is not of the schedule.
        sd15.pipe.unet(torch.zeros(1, 4, 8, 8), 2, torch.zeros(1, 5, 32))
        sample(sd15.pipe)
    assert torch.equal(dial.path_kl, first)
    assert first.shape == (2,)


def test_path_kl_in_weights_mode_where_it_is_asked_for(sd15):
    with realign(sd15.pipe, sd15.anchors["lora1"], 1.0, path_kl=True) as exact:
        sample(sd15.pipe)
    with realign(sd15.pipe, sd15.anchors["lora1"], 1.0, mode="weights", path_kl=True) as dial:
        sample(sd15.pipe)
        assert torch.equal(dial.path_kl, exact.path_kl)
    with realign(sd15.pipe, sd15.anchors["lora1"], 0.5, mode="weights") as dial:
        sample(sd15.pipe)
    assert dial.path_kl.isnan().all()
