"""What a dial can be turned to inside a pipeline, and the cheaper ways to evaluate it."""

import pytest
import torch

from deradiff.method.lambdas import piecewise, ramp
from deradiff.realignment.context import realign
from tests.support.products import sparse_product
from tests.support.realign_world import denoise, fingerprint, sample

METHODS = pytest.mark.parametrize("method", ["full1", "lora1"])


@METHODS
def test_a_mixed_batch_is_each_lambda_on_its_own(world, method):
    lams = (0.0, 0.4, 1.0)
    with realign(world.pipe, world.anchors[method], lam=torch.tensor(lams)) as dial:
        together = sample(world.pipe, (0, 1, 2))
        for image, lam in enumerate(lams):
            dial.lam = lam
            alone = sample(world.pipe, (0, 1, 2))[image]
            if lam in (0, 1):
                assert torch.equal(together[image], alone)
            else:
                assert torch.allclose(together[image], alone, atol=1e-5)


def test_a_mask_splits_the_image(sd15):
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    reference = denoise(sd15.pipe.unet)
    anchor = denoise(sd15.stock("full1").unet)
    with realign(sd15.pipe, sd15.anchors["full1"], mask):
        split = denoise(sd15.pipe.unet)
    assert torch.equal(split[..., :4], reference[..., :4])
    assert torch.equal(split[..., 4:], anchor[..., 4:])


def test_a_schedule_turns_the_dial_by_time(sd15):
    fractions = []

    def half(fraction):
        fractions.append(fraction)
        return 0.5

    with realign(sd15.pipe, sd15.anchors["full1"], half) as dial:
        constant = sample(sd15.pipe)
        times = 1 - sd15.pipe.scheduler.timesteps / 1000
        assert fractions == pytest.approx(times.tolist())
        dial.lam = 0.5
        assert torch.equal(sample(sd15.pipe), constant)

        # Steps, beside the same values set by hand after each step.
        dial.lam = piecewise([(0, 1.0), (0.5, 0.0)])
        stepped = sample(sd15.pipe)
        assert times[1] >= 0.5
        values_by_hand = iter([1.0, 0.0, 0.0])
        dial.lam = next(values_by_hand)

        def turn(pipe, step, t, values):
            dial.lam = next(values_by_hand, 0.0)
            return values

        assert torch.equal(sample(sd15.pipe, callback_on_step_end=turn), stepped)

        dial.lam = ramp(0.2, 0.2)
        ramped = sample(sd15.pipe)
        dial.lam = 0.2
        torch.testing.assert_close(sample(sd15.pipe), ramped)


def test_lora_rows_and_reference_rows_go_as_one_batch(world):
    with realign(world.pipe, world.anchors["lora1"], 0.6) as dial:
        apart = sample(world.pipe)
        assert dial.evaluations == 2
        kl = dial.path_kl
    before = fingerprint(world.pipe.unet)
    calls = []
    with realign(world.pipe, world.anchors["lora1"], 0.6, batched=True) as dial:
        world.pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
        together = sample(world.pipe)
        assert len(calls) == 3
        assert dial.evaluations == 2
        torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
        torch.testing.assert_close(dial.path_kl, kl, rtol=1e-3, atol=0)
        dial.lam = 1
        assert torch.equal(sample(world.pipe), sample(world.stock("lora1")))
    assert fingerprint(world.pipe.unet)["parameters"] == before["parameters"]


def test_several_loras_go_as_one_batch_too(sd15):
    anchors = [sd15.anchors["lora1"], sd15.anchors["lora2"]]
    with realign(sd15.pipe, anchors, [0.5, 0.2]):
        apart = denoise(sd15.pipe.unet)
    with realign(sd15.pipe, anchors, [0.5, 0.2], batched=True):
        torch.testing.assert_close(denoise(sd15.pipe.unet), apart, atol=1e-5, rtol=0)


def test_the_first_step_is_shared_by_all_lambdas(sd15):
    with realign(sd15.pipe, sd15.anchors["full1"], 0.3, shared_start=True) as dial:
        calls = []
        handle = sd15.pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
        first = sample(sd15.pipe)
        dial.lam = 0.7
        second = sample(sd15.pipe)
        handle.remove()
        assert len(calls) == 2 * (3 + 2), "two of three steps were evaluated anew"
        assert dial.evaluations == 2, "what a chain costs does not depend on those before it"
    for lam, images in ((0.7, second), (0.3, first)):
        with realign(sd15.pipe, sd15.anchors["full1"], lam):
            assert torch.equal(sample(sd15.pipe), images)


def test_without_a_shared_start_a_network_that_changes_between_calls_is_evaluated_anew(sd15):
    """Arguments do not show everything: the scale of a LoRA or an IP-Adapter may change."""
    with realign(sd15.pipe, sd15.anchors["full1"], 0.0):
        before = sample(sd15.pipe, num_inference_steps=1)
        with torch.no_grad():
            sd15.pipe.unet.conv_out.bias.add_(1.0)
        assert not torch.equal(sample(sd15.pipe, num_inference_steps=1), before)


@pytest.mark.parametrize(("method", "lam"), sparse_product(["full1", "lora1"], [0.3, 0.8]))
def test_reuse_costs_one_evaluation_and_a_kth(sd15, method, lam):
    def chain(pipe):
        return sample(pipe, num_inference_steps=12)

    with realign(sd15.pipe, sd15.anchors[method], lam) as dial:
        exact = chain(sd15.pipe)
        kl = dial.path_kl
        dial.lam = 0
        reference = chain(sd15.pipe)
    with realign(sd15.pipe, sd15.anchors[method], lam, mode="reuse", every=1):
        assert torch.equal(chain(sd15.pipe), exact)
    with realign(sd15.pipe, sd15.anchors[method], lam, mode="reuse", every=3) as dial:
        reused = chain(sd15.pipe)
        assert dial.evaluations == pytest.approx(1 + 1 / 3)
        # Of random networks the difference is rough in time.
        assert (dial.path_kl > 0.3 * kl).all()
        assert (dial.path_kl < 3 * kl).all()

        for end, images in ((0, reference), (1, chain(sd15.stock(method)))):
            dial.lam = end
            assert torch.equal(chain(sd15.pipe), images)
            assert dial.evaluations <= 1
    assert 0 < (reused - exact).norm() < 0.5 * (exact - reference).norm()


def test_reuse_extrapolates_the_difference_on_a_line(sd15):
    """Between evaluations the output is the reference's plus lam times the line."""
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    text = torch.randn((1, 5, 32), generator=torch.Generator().manual_seed(1))
    outputs = []
    with (
        torch.no_grad(),
        realign(sd15.pipe, sd15.anchors["full1"], 0.5, mode="reuse", every=2),
    ):
        sd15.pipe.scheduler.set_timesteps(5)
        for t in sd15.pipe.scheduler.timesteps:
            outputs.append(sd15.pipe.unet(x, t, text).sample)

    anchor = sd15.stock("full1").unet
    references = []
    differences = []
    with torch.no_grad():
        for t in sd15.pipe.scheduler.timesteps:
            reference = sd15.pipe.unet(x, t, text).sample
            references.append(reference)
            differences.append(anchor(x, t, text).sample - reference)

    # Steps 0, 2 and 4 evaluate the difference, 1 knows one and 3 two of them.
    line = differences[2] + 0.5 * (differences[2] - differences[0])
    for step, difference in ((1, differences[0]), (3, line), (4, differences[4])):
        expected = references[step] + 0.5 * difference
        torch.testing.assert_close(outputs[step], expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::deradiff.realignment.dial.BeyondAnchorWarning")
def test_the_trust_region_holds_each_steps_overshoot(sd15):
    sd15.use_sampler("ddim")
    anchor = sample(sd15.stock("full1"))
    with realign(sd15.pipe, sd15.anchors["full1"], 1.0, path_kl=True) as dial:
        sample(sd15.pipe)
        nats_at_anchor = float(dial.path_kl.min())
    distances = []
    for nats in (1e-9, 0.1 * nats_at_anchor, 1e9):
        with realign(sd15.pipe, sd15.anchors["full1"], 2.0, trust_region=nats):
            images = sample(sd15.pipe)
        distances.append((images - anchor).norm().item())
    with realign(sd15.pipe, sd15.anchors["full1"], 2.0):
        free = sample(sd15.pipe)
    torch.testing.assert_close(images, free, atol=1e-5, rtol=0)
    assert distances[0] < 0.01 * distances[2]
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "reuse", "every": 0}, "every must be a whole number"),
        ({"particles": 2.5}, "particles must be a whole number"),
        ({"trust_region": 0}, "trust_region must be a number of nats"),
        ({"mode": "weights", "trust_region": 1.0}, "trust_region needs"),
        ({"mode": "reuse", "particles": 2}, "particles needs both networks"),
        ({"mode": "weights", "batched": True}, "batched needs both"),
        ({"batched": True}, "a full anchor is another network"),
    ],
)
def test_options_that_do_not_go_together_are_refused(sd15, options, message):
    before = fingerprint(sd15.pipe.unet)
    with (
        pytest.raises(ValueError, match=message),
        realign(sd15.pipe, sd15.anchors["full1"], 0.5, **options),
    ):
        pass
    assert fingerprint(sd15.pipe.unet) == before


def test_modes_for_one_lambda_refuse_several(sd15):
    with (
        pytest.raises(ValueError, match="reuse is for one anchor"),
        realign(sd15.pipe, ["a", "b"], [0.5, 0.5], mode="reuse"),
    ):
        pass
    with (
        realign(sd15.pipe, sd15.anchors["lora1"], torch.tensor([0.1, 0.2]), mode="weights"),
        pytest.raises(ValueError, match="one lam"),
    ):
        sample(sd15.pipe)
    with (
        realign(sd15.pipe, sd15.anchors["lora1"], torch.tensor([0.1, 0.2])),
        pytest.raises(ValueError, match="of 2 images"),
    ):
        sample(sd15.pipe, (0, 1, 2))
