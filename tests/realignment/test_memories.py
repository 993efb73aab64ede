"""Networks that keep keys and values of earlier steps in an object that the pipeline hands around.

As FLUX.2-klein's with a cache, whose network returns the object at the first step, and
Qwen-Image 2.1's, which is given one, and returns the tokens of the text at the first step alone.
"""

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel

from deradiff.method.lambdas import piecewise
from deradiff.realignment.context import realign
from tests.support.toy_pipeline import toy_inputs

LAM = 0.6
KINDS = ("given", "returned")
every_kind = pytest.mark.parametrize("kind", KINDS)


class Memory:
    """What a network keeps."""

    def __init__(self):
        self.first = None
        self.time = None


@pytest.fixture(autouse=True)
def remembering(monkeypatch):
    """UNets whose output depends on what they returned at the first step."""
    own_forward = UNet2DConditionModel.forward

    def forward(self, x, t, text, memory=None, return_dict=False):
        output = own_forward(self, x, t, text, return_dict=False)[0]
        if memory is None:
            memory = Memory()
        if memory.first is None or memory.time == float(t):
            memory.first = output.clone()
            memory.time = float(t)
            # Of the first step it returns more than of the others.
            return torch.cat([output, output], dim=1), memory
        return output + 0.5 * memory.first, memory

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)


class RememberingPipeline(DiffusionPipeline):
    """A UNet that remembers, and a scheduler."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, kind="given", steps=6):
        """Latents (2, 4, 8, 8); `kind` is one of KINDS."""
        x, text, _ = toy_inputs(2)
        memory = Memory() if kind == "given" else None
        self.scheduler.set_timesteps(steps)
        x = x * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(x, t)
            output, returned = self.unet(scaled, t, text, memory=memory)
            memory = memory or returned
            x = self.scheduler.step(output[:, :4], t, x, return_dict=False)[0]
        return x


@pytest.fixture
def toy(sd15):
    """The pipeline, and the network and folder of its anchor."""
    scheduler = EulerDiscreteScheduler.from_config(sd15.pipe.scheduler.config)
    pipe = RememberingPipeline(sd15.pipe.unet, scheduler)
    return pipe, sd15.stock("full1").unet, sd15.anchors["full1"]


@torch.no_grad()
def by_hand(pipe, networks, weights, steps=6):
    """The mixture of networks that have a memory each."""
    x, text, _ = toy_inputs(2)
    memories = [Memory() for _ in networks]
    pipe.scheduler.set_timesteps(steps)
    x = x * pipe.scheduler.init_noise_sigma
    for t in pipe.scheduler.timesteps:
        scaled = pipe.scheduler.scale_model_input(x, t)
        mixture = 0
        for network, memory, weight in zip(networks, memories, weights):
            output, _ = network(scaled, t, text, memory=memory)
            mixture = mixture + weight * output[:, :4]
        x = pipe.scheduler.step(mixture, t, x, return_dict=False)[0]
    return x


@every_kind
def test_each_model_has_a_memory_of_its_own(toy, kind):
    pipe, anchor, folder = toy
    with realign(pipe, folder, LAM) as dial:
        x = pipe(kind)
        assert dial.path_kl.gt(0).all()
        dial.lam = 1
        torch.testing.assert_close(pipe(kind), by_hand(pipe, [anchor], [1]), rtol=0, atol=1e-4)
    expected = by_hand(pipe, [pipe.unet, anchor], [1 - LAM, LAM])
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)


@every_kind
@pytest.mark.parametrize(
    "options",
    [{"lam": piecewise([(0, 0.0), (0.5, LAM)])}, {"lam": 0.5, "mode": "sampled"}],
    ids=["schedule", "sampled"],
)
def test_a_model_that_has_missed_something_is_refused(toy, kind, options):
    pipe, _, folder = toy
    with (
        realign(pipe, folder, **options),
        pytest.raises(ValueError, match="keeps keys and values of earlier steps"),
    ):
        pipe(kind)


@every_kind
def test_mode_reuse_needs_nobody_who_only_reads(toy, kind):
    pipe, _, folder = toy
    with realign(pipe, folder, LAM):
        exact = pipe(kind)
    with realign(pipe, folder, LAM, mode="reuse", every=1):
        torch.testing.assert_close(pipe(kind), exact, rtol=0, atol=1e-4)
    with realign(pipe, folder, LAM, mode="reuse", every=3) as dial:
        reused = pipe(kind)
        # The second step returns less than the first, and is evaluated again.
        assert dial.evaluations == pytest.approx(1 + 3 / 6)
        assert dial.path_kl.isfinite().all()
    reference = pipe(kind)
    assert (reused - exact).norm() < 0.5 * (reference - exact).norm()


@every_kind
def test_the_path_kl_of_mode_weights_does_not_change_what_is_sampled(toy, kind):
    pipe, _, folder = toy
    with realign(pipe, folder, LAM, mode="weights"):
        expected = pipe(kind)
    with realign(pipe, folder, LAM, mode="weights", path_kl=True) as dial:
        x = pipe(kind)
        assert dial.path_kl.gt(0).all()
    assert torch.equal(x, expected)


@every_kind
def test_a_first_step_with_a_memory_is_not_shared(toy, kind):
    pipe, _, folder = toy
    with realign(pipe, folder, LAM) as dial:
        expected = [pipe(kind)]
        dial.lam = 0.3
        expected.append(pipe(kind))
    with realign(pipe, folder, LAM, shared_start=True) as dial:
        assert torch.equal(pipe(kind), expected[0])
        dial.lam = 0.3
        assert torch.equal(pipe(kind), expected[1])
