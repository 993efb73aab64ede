"""What realignment costs: path KL against a sum by hand over the chain's own latents."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import PNDMScheduler

from deradiff.realignment.context import realign
from tests.support.realign_world import SCHEDULERS, STEPS, World, sample


def path_kl_by_hand(
    world: World, method: str, lam: float, guidance: float, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """dial.path_kl of a call, and the same sum over its steps from both networks' outputs on the chain's own latents."""
    pipe, seen = world.pipe, []
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def watch(_, step, t, values):
        seen.append(values["latents"])
        return values

    with realign(pipe, world.anchors[method], lam, path_kl=True) as dial:
        sample(
            pipe,
            guidance_scale=guidance,
            latents=start.clone(),
            callback_on_step_end=watch,
            **options,
        )
        told = dial.path_kl
    times = pipe.scheduler.timesteps.clone()
    pipe.scheduler.set_timesteps(STEPS)
    text, empty = pipe.encode_prompt(["prompt 0", "prompt 1"], "cpu", 1, True)
    anchor, total = world.stock(method).unet, torch.zeros(2)
    bars = pipe.scheduler.alphas_cumprod[times.long()].double()
    for i, t in enumerate(times):
        x = pipe.scheduler.scale_model_input([start * pipe.scheduler.init_noise_sigma, *seen][i], t)
        if hasattr(pipe.scheduler, "_step_index"):
            pipe.scheduler._step_index += 1
        with torch.no_grad():
            d, d_empty = (anchor(x, t, e).sample - pipe.unet(x, t, e).sample for e in (text, empty))
        d = d_empty + guidance * (d - d_empty) if guidance > 1 else d
        ratio = (
            (bars[i + 1] / (1 - bars[i + 1])) / (bars[i] / (1 - bars[i]))
            if i + 1 < len(times)
            else torch.tensor(math.e)
        )
        scale = bars[i] if pipe.scheduler.config.prediction_type == "v_prediction" else 1.0
        total += 0.5 * lam**2 * ratio.log() * scale * d.square().sum((1, 2, 3))
    return told, total


@pytest.mark.parametrize(("lam", "guidance"), [(0.6, 3.0), (1.0, 1.0)])
@pytest.mark.parametrize(
    ("sampler", "prediction"), [("ddim", "epsilon"), ("ddim", "v_prediction"), ("euler", "epsilon")]
)
def test_path_kl_is_the_sum_over_the_chain(sd15, sampler, prediction, lam, guidance):
    settings = {"prediction_type": prediction, "timestep_spacing": "leading"}
    sd15.pipe.scheduler = SCHEDULERS[sampler].from_config(sd15.pipe.scheduler.config, **settings)
    told, by_hand = path_kl_by_hand(sd15, "full1", lam, guidance)
    assert told.shape == (2,) and (told > 0).all()
    torch.testing.assert_close(told, by_hand, rtol=2e-4, atol=0)


def test_path_kl_is_of_the_last_call_an_image_each(sd15):
    with realign(sd15.pipe, sd15.anchors["full1"], lam=0.5) as dial:
        assert dial.path_kl.shape == (0,)
        sample(sd15.pipe, (0, 1))
        first = dial.path_kl
        sample(sd15.pipe, (0, 1), num_images_per_prompt=2)
        assert dial.path_kl.shape == (4,)
        sample(sd15.pipe, (0, 1))
        assert torch.equal(dial.path_kl, first)
        torch.testing.assert_close(
            torch.cat([(sample(sd15.pipe, (s,)), dial.path_kl)[1] for s in (0, 1)]),
            first,
            rtol=1e-4,
            atol=0,
        )
        dial.lam = 0
        sample(sd15.pipe)
        assert dial.path_kl.tolist() == [0.0, 0.0]
        dial.lam = 1
        sample(sd15.pipe)
        assert dial.path_kl.isnan().all()  # the reference was not evaluated


def test_path_kl_counts_repeated_timesteps_once_and_strays_never(sd15):
    """PNDM, SD1.5's own scheduler, visits its second timestep twice."""
    sd15.pipe.scheduler = PNDMScheduler.from_config(sd15.pipe.scheduler.config, skip_prk_steps=True)
    with realign(sd15.pipe, sd15.anchors["full1"], lam=0.5) as dial:
        sample(sd15.pipe)
        assert len(sd15.pipe.scheduler.timesteps) == STEPS + 1
        told = dial.path_kl
        sd15.pipe.unet(torch.zeros(1, 4, 8, 8), 2, torch.zeros(1, 5, 32))  # no time of the schedule
        sample(sd15.pipe)
    assert torch.equal(dial.path_kl, told) and told.shape == (2,)


def test_path_kl_in_weights_mode_where_it_is_asked_for(sd15):
    with realign(sd15.pipe, sd15.anchors["lora1"], 1.0, path_kl=True) as exact:
        sample(sd15.pipe)
    with realign(sd15.pipe, sd15.anchors["lora1"], 1.0, mode="weights", path_kl=True) as dial:
        sample(sd15.pipe)
        assert torch.equal(dial.path_kl, exact.path_kl)
    with realign(sd15.pipe, sd15.anchors["lora1"], 0.5, mode="weights") as dial:
        sample(sd15.pipe)
    assert dial.path_kl.isnan().all()
