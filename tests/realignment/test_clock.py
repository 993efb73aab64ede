"""The clock: the scheduler's own count, whatever time the network is told and in what precision."""

from types import SimpleNamespace

import diffusers
import pytest
import torch

from deradiff.realignment.clock import Clock
from deradiff.realignment.guided_steps import GuidedSteps
from deradiff.realignment.path_kl import PathKL
from deradiff.realignment.scheduler_tap import SchedulerTap

pytestmark = pytest.mark.filterwarnings("ignore::deradiff.realignment.path_kl.NonlinearStepWarning")
SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
    "EDMEulerScheduler",
]

TOLD = {
    "t": lambda t: t,
    "t / 1000": lambda t: t / 1000,
    "1 - t / 1000": lambda t: 1 - t / 1000,
    "1000 - t": lambda t: 1000 - t,
    "t - 1": lambda t: t - 1,
    "a time for each token": lambda t: t.expand(2, 5),
    "nothing": lambda t: None,
}


def walked(scheduler, told, dtype, calls, steps):
    """The index and evaluation of each evaluation of one chain, and what they should be."""
    clock = Clock()
    kl = PathKL(clock)
    dial = SimpleNamespace(strengths=[])
    guided = GuidedSteps(clock, kl, dial, None, None, 1)
    tap = SchedulerTap(guided)
    guided.follow(SimpleNamespace(scheduler=scheduler), tap)
    seen = []
    expected = []
    try:
        scheduler.set_timesteps(steps)
        x = torch.zeros(1, 4, 2, 2)
        for index, t in enumerate(scheduler.timesteps):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            for evaluation in range(calls):
                time = told(t)
                if time is not None and torch.as_tensor(time).is_floating_point():
                    time = time.to(dtype)
                clock.tick(time)
                guided.note_evaluation(1)
                seen.append((clock.index, clock.evaluation, clock.is_new_call))
                expected.append((index, evaluation, index == 0 and evaluation == 0))
            scheduler.step(0.1 * torch.ones_like(x), t, x)
    finally:
        tap.release()
    return seen, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("steps", [4, 28, 50, 100])
def test_flow_chains_of_any_length_are_followed_whatever_the_network_is_told(told, dtype, steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    seen, expected = walked(scheduler, TOLD[told], dtype, calls=2, steps=steps)
    assert seen == expected


def test_a_scheduler_that_is_called_twice_for_a_step_is_followed_to_the_end():
    """As in Cosmos, which predicts the data by a first call and sets the count back."""
    scheduler = diffusers.EDMEulerScheduler()
    clock = Clock()
    guided = GuidedSteps(clock, PathKL(clock), SimpleNamespace(strengths=[]), None, None, 1)
    tap = SchedulerTap(guided)
    guided.follow(SimpleNamespace(scheduler=scheduler), tap)
    seen = []
    try:
        for _ in range(2):
            scheduler.set_timesteps(5)
            x = torch.zeros(1, 4, 2, 2)
            for t in scheduler.timesteps:
                scheduler.scale_model_input(x, t)
                clock.tick(t)
                guided.note_evaluation(1)
                seen.append((clock.index, clock.is_new_call))
                scheduler.step(torch.ones_like(x), t, x)
                scheduler._step_index -= 1
                x = scheduler.step(torch.ones_like(x), t, x, return_dict=False)[0]
    finally:
        tap.release()
    assert seen == 2 * [(index, index == 0) for index in range(5)]


@pytest.mark.parametrize("told", ["first frame", "each frame"])
def test_the_largest_of_several_times_tells_where_copies_of_the_scheduler_step(told):
    """As in SkyReels V2, where each frame has a scheduler and a given frame is told 0."""
    scheduler = diffusers.UniPCMultistepScheduler()
    clock = Clock()
    clock.follow(scheduler)
    scheduler.set_timesteps(4)
    clock.announce_chain()
    seen = []
    for t in scheduler.timesteps:
        times = torch.stack([torch.zeros_like(t) if told == "first frame" else t, t])
        clock.tick(times.expand(2, 2))
        seen.append((clock.index, round(clock.fraction, 3)))
    expected = [round(1 - float(t) / 1000, 3) for t in scheduler.timesteps]
    assert seen == list(enumerate(expected))


@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_followed(name, calls):
    kind = getattr(diffusers, name)
    seen, expected = walked(kind(), TOLD["t"], torch.float32, calls, steps=4)
    assert seen == expected
    seen, expected = walked(kind(), TOLD["nothing"], torch.float32, calls, steps=7)
    assert seen == expected


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_is_as_before_and_a_copy_steps_for_itself(name):
    kind = getattr(diffusers, name)
    before = {method: vars(kind).get(method) for method in ("step", "set_timesteps")}
    walked(kind(), TOLD["t"], torch.float32, 1, 4)
    assert {method: vars(kind).get(method) for method in before} == before


def test_fractions_of_time_run_from_0_to_1_and_never_back():
    for name in SCHEDULERS:
        scheduler = getattr(diffusers, name)()
        clock = Clock()
        clock.follow(scheduler)
        scheduler.set_timesteps(6)
        clock.announce_chain()
        fractions = []
        for t in scheduler.timesteps:
            clock.tick(t)
            fractions.append(clock.fraction)
            clock.finish_step()
        assert fractions == sorted(fractions), name
        assert min(fractions) >= 0, name
        assert max(fractions) <= 1, name
