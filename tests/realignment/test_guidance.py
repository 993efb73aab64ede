"""Whatever guidance a pipeline has, what realignment measures and mixes is what guidance makes.

Each is compared with a second run by hand, which evaluates both networks at the chain's latents and
guides the reference and the mixture apart.
"""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
)

from deradiff.method.branches import ByBranch
from deradiff.method.particles import log_weight
from deradiff.method.transitions import kl_factors
from deradiff.realignment.context import realign
from deradiff.realignment.dial import NegativeLambdaWarning
from deradiff.realignment.path_kl import NonlinearStepWarning, UnknownPathKLWarning
from tests.support.toy_pipeline import GUIDANCES, ToyPipeline, toy_inputs

LAM = 0.6
every_guidance = pytest.mark.parametrize("guidance", GUIDANCES)
LIKE_ANOTHER = ("one_batch", "negated", "without")


def guidances(*missing):
    """All but those; those that evaluate the network in the same way as another one are slow."""
    for name in GUIDANCES:
        if name not in missing:
            yield pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_ANOTHER else [])


@pytest.fixture
def toy(sd15):
    """The pipeline, and the network and folder of its anchor."""
    scheduler = EulerDiscreteScheduler.from_config(sd15.pipe.scheduler.config)
    return ToyPipeline(sd15.pipe.unet, scheduler), sd15.stock("full1").unet, sd15.anchors["full1"]


def mixture_of(reference, anchor, lam):
    """A network that is the mixture of two."""

    def mixed(*args, **kwargs):
        own = reference(*args, **kwargs)[0]
        theirs = anchor(*args, **kwargs)[0]
        return (own + lam * (theirs - own),)

    return mixed


@torch.no_grad()
def by_hand(pipe, anchor, guidance, lam=LAM, images=2, steps=4):
    """The latents and the path KL of the mixed chain."""
    x, text, empty = toy_inputs(images)
    pipe.scheduler.set_timesteps(steps)
    factors = kl_factors(pipe.scheduler)
    x = x * pipe.scheduler.init_noise_sigma
    path_kl = torch.zeros(images, dtype=torch.float64)
    for index, t in enumerate(pipe.scheduler.timesteps):
        scaled = pipe.scheduler.scale_model_input(x, t)
        guide = GUIDANCES[guidance]
        mixed = guide(mixture_of(pipe.unet, anchor, lam), scaled, t, text, empty)
        reference = guide(pipe.unet, scaled, t, text, empty)
        shift = (mixed - reference).double()
        path_kl += factors[index] * shift.square().sum((1, 2, 3))
        x = pipe.scheduler.step(mixed, t, x, return_dict=False)[0]
    return x, path_kl


@every_guidance
def test_the_chain_and_its_path_kl_are_those_of_a_second_run(toy, guidance):
    pipe, anchor, folder = toy
    with realign(pipe, folder, LAM) as dial:
        x = pipe(guidance)
        path_kl = dial.path_kl
    assert type(x) is torch.Tensor
    expected, expected_kl = by_hand(pipe, anchor, guidance)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(path_kl.double(), expected_kl, rtol=1e-5, atol=1e-5)


@every_guidance
def test_the_ends_are_the_stock_pipelines_bit_for_bit(toy, guidance):
    pipe, _, folder = toy
    reference = pipe(guidance)
    own = pipe.unet
    pipe.unet = type(own).from_pretrained(folder, subfolder="unet")
    anchored = pipe(guidance)
    pipe.unet = own
    with realign(pipe, folder, 0) as dial:
        assert torch.equal(pipe(guidance), reference)
        assert dial.path_kl.tolist() == [0, 0]
        dial.lam = 1
        assert torch.equal(pipe(guidance), anchored)


@pytest.mark.parametrize("guidance", guidances())
def test_each_image_has_its_own_lambda(toy, guidance):
    pipe, anchor, folder = toy
    lams = torch.tensor([0.2, 0.9])
    with realign(pipe, folder, lams) as dial:
        x = pipe(guidance)
        path_kl = dial.path_kl
    for image, lam in enumerate(lams.tolist()):
        expected, expected_kl = by_hand(pipe, anchor, guidance, lam)
        torch.testing.assert_close(x[image], expected[image], rtol=0, atol=1e-4)
        torch.testing.assert_close(path_kl[image].double(), expected_kl[image], rtol=1e-4, atol=0)


def test_a_lambda_for_another_number_of_images_is_refused(toy):
    pipe, _, folder = toy
    with (
        realign(pipe, folder, torch.tensor([0.1, 0.2, 0.3, 0.4])),
        pytest.raises(ValueError, match="lam is of 4 images and the pipeline samples 2"),
    ):
        pipe("one_batch")


@pytest.mark.parametrize("guidance", guidances())
def test_a_mask_mixes_each_region_by_its_own_lambda(toy, guidance):
    pipe, _, folder = toy
    with realign(pipe, folder, LAM):
        number = pipe(guidance)
    with realign(pipe, folder, torch.full((8, 8), LAM)):
        mask = pipe(guidance)
    torch.testing.assert_close(mask, number, rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance", guidances("rescaled"))
def test_a_branch_alone_is_the_anchor_in_that_branch_alone(toy, guidance):
    pipe, anchor, folder = toy

    def conditional_anchor(x, t, rows, **_):
        """The anchor for rows of prompts, the reference for others."""
        _, text, _ = toy_inputs(2)
        own = pipe.unet(x, t, rows)[0]
        theirs = anchor(x, t, rows)[0]
        is_prompt = torch.stack([(row == text).flatten(1).all(1).any() for row in rows])
        return (torch.where(is_prompt.view(-1, 1, 1, 1), theirs, own),)

    with realign(pipe, folder, ByBranch(conditional=1.0, unconditional=0.0)) as dial:
        x = pipe(guidance)
        dial.lam = ByBranch(LAM, LAM)
        both = pipe(guidance)
    expected = _chain(pipe, conditional_anchor, guidance)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)
    expected, _ = by_hand(pipe, anchor, guidance)
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def _chain(pipe, network, guidance):
    x, text, empty = toy_inputs(2)
    pipe.scheduler.set_timesteps(4)
    x = x * pipe.scheduler.init_noise_sigma
    for t in pipe.scheduler.timesteps:
        scaled = pipe.scheduler.scale_model_input(x, t)
        guided = GUIDANCES[guidance](network, scaled, t, text, empty)
        x = pipe.scheduler.step(guided, t, x, return_dict=False)[0]
    return x


def test_a_negative_lambda_goes_the_other_way_and_is_said_once(toy):
    pipe, anchor, folder = toy
    with (
        pytest.warns(NegativeLambdaWarning, match="away from the anchor") as caught,
        realign(pipe, folder, -0.3) as dial,
    ):
        x = pipe("one_batch")
        path_kl = dial.path_kl
        dial.lam = -0.2
    assert len([w for w in caught if w.category is NegativeLambdaWarning]) == 1
    expected, expected_kl = by_hand(pipe, anchor, "one_batch", lam=-0.3)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(path_kl.double(), expected_kl, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::deradiff.realignment.resampling.GuidedParticlesWarning")
@pytest.mark.parametrize("guidance", guidances())
def test_particles_are_weighed_by_guided_differences(toy, guidance, monkeypatch):
    pipe, _, folder = toy
    seen = []

    def note(factor, lams, differences):
        weights = log_weight(factor, lams, differences)
        seen.append((lams[0] * differences[0], len(weights)))
        return weights

    monkeypatch.setattr("deradiff.realignment.resampling.log_weight", note)
    with realign(pipe, folder, LAM, particles=2) as dial:
        pipe(guidance)
        assert dial.ess.shape == (1,)
    assert [rows for _, rows in seen] == [2] * 4


@pytest.mark.parametrize("guidance", guidances("rescaled"))
def test_the_trust_region_bounds_the_guided_step(toy, guidance):
    pipe, anchor, folder = toy
    with realign(pipe, folder, 1.0):
        at_anchor = pipe(guidance)
    with pytest.warns(UserWarning, match="beyond"), realign(pipe, folder, 3.0, trust_region=1e-9):
        bounded = pipe(guidance)
    torch.testing.assert_close(bounded, at_anchor, rtol=0, atol=1e-3)
    with pytest.warns(UserWarning, match="beyond"), realign(pipe, folder, 3.0, trust_region=1e9):
        unbounded = pipe(guidance)
    expected, _ = by_hand(pipe, anchor, guidance, lam=3.0)
    torch.testing.assert_close(unbounded, expected, rtol=0, atol=1e-3)


@torch.inference_mode()
def test_it_is_known_in_inference_mode_too(toy):
    pipe, anchor, folder = toy
    with realign(pipe, folder, LAM) as dial:
        pipe("two_calls")
        path_kl = dial.path_kl
    _, expected = by_hand(pipe, anchor, "two_calls")
    torch.testing.assert_close(path_kl.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_scheduler_of_unknown_noise_is_mixed_all_the_same_and_nan_is_said_once(toy):
    pipe, _, folder = toy
    pipe.scheduler = EDMEulerScheduler()
    with realign(pipe, folder, LAM) as dial:
        assert pipe("one_batch").isfinite().all()
        with pytest.warns(UnknownPathKLWarning, match="EDMEulerScheduler does not tell") as caught:
            assert dial.path_kl.isnan().all()
            assert dial.path_kl.isnan().all()
    assert len([w for w in caught if w.category is UnknownPathKLWarning]) == 1


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_a_step_that_clips_is_said_once_and_measured_on_itself(toy, kind):
    pipe, anchor, folder = toy
    pipe.scheduler = kind.from_config(pipe.scheduler.config, clip_sample=True)
    with (
        pytest.warns(NonlinearStepWarning, match="clip_sample=False") as caught,
        realign(pipe, folder, LAM) as dial,
    ):
        torch.manual_seed(5)
        pipe("one_batch")
        path_kl = dial.path_kl
        pipe("one_batch")
    assert len([w for w in caught if w.category is NonlinearStepWarning]) == 1

    # By hand: how far the step's mean is from the reference's, in units of its noise prediction.
    torch.manual_seed(5)
    expected = clipped_by_hand(pipe, anchor)
    torch.testing.assert_close(path_kl.double(), expected, rtol=1e-3, atol=1e-3)
    with (
        pytest.warns(NonlinearStepWarning),
        pytest.raises(ValueError, match="particles needs the KL divergence of each step"),
        realign(pipe, folder, LAM, particles=2),
    ):
        pipe("one_batch")


@torch.no_grad()
def clipped_by_hand(pipe, anchor):
    """The path KL of a chain of clipped steps, whose mean is a x0 + b eps."""
    scheduler = pipe.scheduler
    x, text, empty = toy_inputs(2)
    scheduler.set_timesteps(4)
    factors = kl_factors(scheduler)
    total = torch.zeros(2, dtype=torch.float64)
    gap = scheduler.config.num_train_timesteps // 4
    for index, t in enumerate(scheduler.timesteps.tolist()):
        bar = scheduler.alphas_cumprod[t].double()
        is_last = t - gap < 0
        final = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0))
        bar_next = (final if is_last else scheduler.alphas_cumprod[t - gap]).double()
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        alpha_next, sigma_next = bar_next.sqrt(), (1 - bar_next).sqrt()

        mixed = GUIDANCES["one_batch"](mixture_of(pipe.unet, anchor, LAM), x, t, text, empty)
        reference = GUIDANCES["one_batch"](pipe.unet, x, t, text, empty)
        limit = scheduler.config.clip_sample_range
        data = [((x - sigma * eps) / alpha).clamp(-limit, limit) for eps in (mixed, reference)]
        if isinstance(scheduler, DDIMScheduler):
            moved = alpha_next * (data[0] - data[1]) + sigma_next * (mixed - reference)
            slope = sigma_next - alpha_next * sigma / alpha
        else:
            # The posterior mean of DDPM (Ho et al. 2020, Eq. 7) sees the clipped data alone.
            weight = alpha_next * (1 - bar / bar_next) / (1 - bar)
            moved = weight * (data[0] - data[1])
            slope = -weight * sigma / alpha
        effective = moved / slope
        total += factors[index] * effective.double().square().sum((1, 2, 3))
        x = scheduler.step(mixed, t, x, return_dict=False)[0]
    return total


def test_an_output_that_is_written_elsewhere_makes_the_path_kl_nan_and_not_wrong(toy, monkeypatch):
    pipe, anchor, folder = toy
    monkeypatch.setitem(GUIDANCES, "elsewhere", elsewhere)
    with realign(pipe, folder, LAM) as dial:
        x = pipe("elsewhere")
        with pytest.warns(UnknownPathKLWarning, match="could not be followed"):
            assert dial.path_kl.isnan().all()
    expected, _ = by_hand(pipe, anchor, "one_batch")
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)


def test_mode_sampled_is_one_network_a_step_in_the_proportions_of_lambda(toy):
    pipe, _, folder = toy
    used = []
    own_forward = pipe.unet.forward
    weight = next(pipe.unet.parameters()).detach().clone()

    def note(*args, **kwargs):
        used.append(not torch.equal(next(pipe.unet.parameters()), weight))
        return own_forward(*args, **kwargs)

    pipe.unet.forward = note
    with realign(pipe, folder, 0.25, mode="sampled") as dial:
        first = pipe("two_calls", steps=40)
        assert dial.evaluations == 1
        assert torch.equal(pipe("two_calls", steps=40), first)
    pairs = list(zip(used[::2], used[1::2]))
    assert all(conditional == unconditional for conditional, unconditional in pairs)
    assert abs(sum(conditional for conditional, _ in pairs) - 2 * 10) <= 2
    with (
        pytest.raises(
            ValueError, match=r"takes lam as a probability, from 0 to 1 in sum, not 1\.5"
        ),
        pytest.warns(UserWarning, match="beyond"),
        realign(pipe, folder, 1.5, mode="sampled"),
    ):
        pipe("two_calls")


def test_a_clipped_step_that_would_not_move_makes_the_path_kl_nan(toy):
    pipe, _, folder = toy
    settings = {"clip_sample": True, "steps_offset": 0, "set_alpha_to_one": False}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    with pytest.warns(NonlinearStepWarning), realign(pipe, folder, LAM) as dial:
        pipe("one_batch")
        assert dial.path_kl.isnan().all()


LOST_OPTIONS = {
    "a branch": {"lam": ByBranch(1.0, 0.0)},
    "particles": {"lam": LAM, "particles": 2},
    "a trust region": {"lam": LAM, "trust_region": 1.0},
}


def elsewhere(network, x, t, text, empty):
    """The guided output, written into a tensor that does not know where it comes from."""
    buffer = torch.empty_like(x)
    buffer[:] = GUIDANCES["one_batch"](network, x, t, text, empty)
    return buffer


@pytest.mark.parametrize("name", LOST_OPTIONS)
def test_what_needs_guidance_to_be_followed_is_refused_where_it_is_not(toy, monkeypatch, name):
    pipe, _, folder = toy
    monkeypatch.setitem(GUIDANCES, "elsewhere", elsewhere)
    with (
        realign(pipe, folder, **LOST_OPTIONS[name]),
        pytest.raises(ValueError, match="could not be followed"),
    ):
        pipe("elsewhere")


@pytest.mark.parametrize("name", LOST_OPTIONS)
def test_what_needs_the_schedulers_steps_is_refused_where_they_are_not_seen(toy, name):
    pipe, _, folder = toy
    pipe.scheduler.step = pipe.scheduler.step  # somebody's own, on the instance
    with (
        realign(pipe, folder, **LOST_OPTIONS[name]),
        pytest.raises(ValueError, match="steps of EulerDiscreteScheduler cannot be seen"),
    ):
        pipe("one_batch")


def test_a_chain_whose_steps_are_not_seen_has_no_path_kl(toy):
    pipe, anchor, folder = toy
    pipe.scheduler.step = pipe.scheduler.step
    with realign(pipe, folder, LAM) as dial:
        x = pipe("one_batch")
        with pytest.warns(UnknownPathKLWarning, match="cannot be seen"):
            assert dial.path_kl.isnan().all()
    expected, _ = by_hand(pipe, anchor, "one_batch")
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)


def test_branches_that_cannot_be_told_apart_are_refused(toy, monkeypatch):
    pipe, _, folder = toy

    def other_latents(network, x, t, text, empty):
        """Rows of unlike latents, as no pipeline of diffusers has them."""
        rows = torch.cat([x, x + 0.01])
        out = network(rows, t, torch.cat([empty, text]), return_dict=False)[0]
        unconditional, conditional = out.chunk(2)
        return unconditional + 3.0 * (conditional - unconditional)

    monkeypatch.setitem(GUIDANCES, "other_latents", other_latents)
    with (
        realign(pipe, folder, ByBranch(1.0, 0.0)),
        pytest.raises(ValueError, match="branches of guidance cannot be told apart"),
    ):
        pipe("other_latents")


def test_a_shared_start_survives_guidance_that_writes_into_the_output(toy):
    pipe, anchor, folder = toy
    expected = {lam: by_hand(pipe, anchor, "in_place", lam)[0] for lam in (0.0, LAM, 1.0)}
    with realign(pipe, folder, 0.0, shared_start=True) as dial:
        for lam in (0.0, 1.0, LAM, 0.0, 1.0):
            dial.lam = lam
            torch.testing.assert_close(pipe("in_place"), expected[lam], rtol=0, atol=1e-3)


def test_a_lambda_that_is_set_in_the_middle_is_checked_too(toy):
    pipe, _, folder = toy
    seen = []

    def lam(fraction):
        seen.append(fraction)
        return LAM if len(seen) == 1 else torch.full((4,), LAM)

    with (
        realign(pipe, folder, lam),
        pytest.raises(ValueError, match="lam is of 4 images and the pipeline samples 2"),
    ):
        pipe("one_batch")


@torch.inference_mode()
def test_a_lora_works_in_inference_mode(toy, sd15):
    pipe, _, _ = toy
    with realign(pipe, sd15.anchors["lora1"], LAM) as dial:
        assert pipe("two_calls").isfinite().all()
        assert dial.path_kl.gt(0).all()
