"""The dial in modular pipelines, whose guidance is an object and whose loop is a block.

Chains are compared with chains that are mixed by hand, evaluation by evaluation.
"""

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, EulerDiscreteScheduler
from PIL import Image

from deradiff.anchors.anchor import AnchorCard, save_anchor
from deradiff.method.branches import ByBranch
from deradiff.method.transitions import kl_factors
from deradiff.models.pipelines import denoiser_name
from deradiff.realignment.context import realign
from tests.support.modular_pipelines import (
    BLOCKS,
    GUIDERS,
    SCALE,
    ByHand,
    modular,
    sample,
    save_anchors,
    tiny_modular,
)
from tests.support.products import sparse_product
from tests.support.realign_world import fingerprint
from tests.support.tiny_pipelines import perturbed_denoiser

LAM = 0.4
every_guider = pytest.mark.parametrize("guider", GUIDERS)


@pytest.fixture
def sdxl(worlds):
    return worlds["sdxl"].copy()


def anchor_weights(sdxl):
    return sdxl.stock("full1").unet.state_dict()


@pytest.mark.parametrize(("anchor", "guider"), sparse_product(["full1", "lora1"], [*GUIDERS]))
def test_the_ends_are_stock_modular_pipelines_and_all_is_restored(sdxl, anchor, guider):
    pipe = modular(sdxl.pipe, GUIDERS[guider]())
    reference = sample(pipe)
    # Some guiders leave an empty registry of hooks on the network.
    before = fingerprint(sdxl.pipe.unet)
    anchored = sample(modular(sdxl.stock(anchor), GUIDERS[guider]()))
    with realign(pipe, sdxl.anchors[anchor], 0) as dial:
        assert torch.equal(sample(pipe), reference)
        dial.lam = 1
        assert torch.equal(sample(pipe), anchored)
        dial.lam = 0.5
        middle = sample(pipe)
        assert dial.path_kl.gt(0).all()
        assert dial.evaluations == 2
    assert not torch.equal(middle, reference)
    assert not torch.equal(middle, anchored)
    assert fingerprint(sdxl.pipe.unet) == before


@every_guider
def test_the_chain_and_its_path_kl_are_those_of_a_second_run(sdxl, guider):
    pipe = modular(sdxl.pipe, GUIDERS[guider]())
    with realign(pipe, sdxl.anchors["full1"], LAM) as dial:
        x = sample(pipe)
        path_kl = dial.path_kl
    with ByHand(pipe, anchor_weights(sdxl), (LAM, LAM)).installed() as by_hand:
        expected = sample(pipe)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    pipe.scheduler.set_timesteps(len(by_hand.shifts))
    factors = kl_factors(pipe.scheduler)
    expected_kl = 0.0
    for factor, shift in zip(factors, by_hand.shifts):
        expected_kl += float(factor * shift.double().square().sum())
    assert float(path_kl) == pytest.approx(expected_kl, rel=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_every_modular_pipeline_is_the_mixture_of_its_networks(tmp_path, name, method):
    pipe = tiny_modular(name)
    network = getattr(pipe, denoiser_name(pipe))
    anchors = save_anchors(pipe, tmp_path, name.removesuffix(" base"))
    before = fingerprint(network)
    reference = sample(pipe)
    with realign(pipe, anchors[method], 0) as dial:
        assert torch.equal(sample(pipe), reference)
        dial.lam = LAM
        x = sample(pipe)
        assert dial.path_kl.gt(0).all()
    assert fingerprint(network) == before
    distance = (x - reference).norm()
    assert distance > 0
    if method == "full":
        weights = perturbed_denoiser(network).state_dict()
        with ByHand(pipe, weights, (LAM, LAM)).installed():
            expected = sample(pipe)
        assert (x - expected).norm() < 1e-3 * distance


@pytest.mark.parametrize("name", ["sd3", "z_image", "flux2_klein base"])
def test_mode_weights_is_the_network_at_the_mean_of_the_weights(tmp_path, name):
    pipe = tiny_modular(name)
    anchors = save_anchors(pipe, tmp_path, name.removesuffix(" base"))
    with realign(pipe, anchors["full"], LAM, mode="weights") as dial:
        x = sample(pipe)
        assert dial.evaluations == 1
    network = getattr(pipe, denoiser_name(pipe))
    other = perturbed_denoiser(network).state_dict()
    own = network.state_dict()
    network.load_state_dict({key: own[key] + LAM * (other[key] - own[key]) for key in own})
    torch.testing.assert_close(x, sample(pipe), rtol=0, atol=1e-4)


def test_a_guider_is_measured_as_the_same_guidance_in_a_plain_pipeline(sdxl):
    """Two calls of the network in one form, one batch in the other."""
    options = {"prompt": "a cat", "negative_prompt": "", "num_inference_steps": 3}
    options |= {"height": 64, "width": 64, "guidance_scale": SCALE, "output_type": "latent"}
    with realign(sdxl.pipe, sdxl.anchors["full1"], 0.5) as dial:
        images = sdxl.pipe(generator=torch.Generator().manual_seed(0), **options).images
        path_kl = dial.path_kl
    pipe = modular(sdxl.pipe, GUIDERS["classifier-free"]())
    with realign(pipe, sdxl.anchors["full1"], 0.5) as dial:
        torch.testing.assert_close(sample(pipe), images, rtol=0, atol=1e-3)
        torch.testing.assert_close(dial.path_kl, path_kl, rtol=1e-3, atol=0)


def test_momentum_of_guidance_is_followed(sdxl):
    """The path KL at a small lambda is that of its derivative: it falls with the square."""
    guider = AdaptiveProjectedGuidance(SCALE, adaptive_projected_guidance_momentum=-0.5)
    pipe = modular(sdxl.pipe, guider)
    path_kls = []
    for lam in (0.02, 0.01):
        with realign(pipe, sdxl.anchors["full1"], lam) as dial:
            sample(pipe)
            path_kls.append(float(dial.path_kl))
    assert path_kls[0] / path_kls[1] == pytest.approx(4, rel=0.1)


@every_guider
def test_a_lambda_for_each_branch_is_exact_under_any_guider(sdxl, guider):
    """The guider tells which branch it evaluates, so that guidance may be as it likes."""
    pipe = modular(sdxl.pipe, GUIDERS[guider]())
    with realign(pipe, sdxl.anchors["full1"], ByBranch(0.3, 0.8)) as dial:
        x = sample(pipe)
        assert dial.path_kl.isfinite().all()
    with ByHand(pipe, anchor_weights(sdxl), (0.3, 0.8)).installed():
        expected = sample(pipe)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


def test_the_anchor_in_one_branch_alone_costs_one_evaluation_a_branch(sdxl):
    pipe = modular(sdxl.pipe, GUIDERS["classifier-free"]())
    with realign(pipe, sdxl.anchors["full1"], ByBranch(1.0, 0.0)) as dial:
        x = sample(pipe)
        assert dial.evaluations == 1
        assert dial.path_kl.isnan().all()
    with realign(pipe, sdxl.anchors["full1"], ByBranch(1.0, 0.0), path_kl=True) as dial:
        assert torch.equal(sample(pipe), x)
        assert dial.path_kl.gt(0).all()


def test_the_steps_that_count_are_those_of_the_pipeline_that_is_called(sdxl):
    """Modular pipelines share networks, each with a scheduler of its own."""
    pipe = modular(sdxl.pipe, GUIDERS["classifier-free"]())
    other = modular(sdxl.pipe, GUIDERS["classifier-free"]())
    scheduler = EulerDiscreteScheduler.from_config(sdxl.pipe.scheduler.config)
    other.update_components(scheduler=scheduler)
    with realign(other, sdxl.anchors["full1"], LAM) as dial:
        expected = sample(other)
        path_kl = dial.path_kl
    with realign(pipe, sdxl.anchors["full1"], LAM) as dial:
        sample(pipe)
        assert torch.equal(sample(other), expected)
        assert torch.equal(dial.path_kl, path_kl)


def test_what_a_call_returns_are_plain_tensors(sdxl):
    pipe = modular(sdxl.pipe, GUIDERS["classifier-free"]())
    with realign(pipe, sdxl.anchors["full1"], LAM):
        state = pipe(prompt="a cat", num_inference_steps=2, height=64, width=64)
    for value in state.values.values():
        assert not isinstance(value, torch.Tensor) or type(value) is torch.Tensor


def test_models_draw_the_same_random_numbers(sdxl, tmp_path):
    """An anchor that is the reference differs from it in nothing, and the stream goes on."""
    card = AnchorCard(base_model="tiny", family="sdxl", method="full", beta=2000)
    save_anchor(tmp_path, sdxl.pipe.unet, card)
    sdxl.pipe.unet.train()
    for module in sdxl.pipe.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    torch.manual_seed(0)
    expected = sdxl.pipe("a cat", num_inference_steps=2, height=64, width=64, output_type="latent")
    expected_next = torch.rand(3)
    with realign(sdxl.pipe, tmp_path, 0.5) as dial:
        torch.manual_seed(0)
        images = sdxl.pipe(
            "a cat", num_inference_steps=2, height=64, width=64, output_type="latent"
        )
        assert torch.equal(torch.rand(3), expected_next)
        assert dial.path_kl.tolist() == [0]
    torch.testing.assert_close(images.images, expected.images, rtol=0, atol=1e-5)


def from_image(name):
    """(name of the blocks); one of them is quick."""
    return pytest.param(name, marks=[] if name == "sdxl" else [pytest.mark.slow])


@pytest.mark.parametrize("name", map(from_image, BLOCKS))
def test_a_chain_that_begins_at_an_image_is_mixed_as_by_hand(name, tmp_path):
    """Image to image, or images as a condition, whichever the blocks do with one."""
    pipe = tiny_modular(name)
    options = {"image": Image.new("RGB", (64, 64), "orange")}
    if "strength" in {parameter.name for parameter in pipe.blocks.inputs}:
        options["strength"] = 0.8
    reference = sample(pipe, steps=4, **options)
    part = denoiser_name(pipe)
    anchor = perturbed_denoiser(getattr(pipe, part))
    anchor.save_pretrained(tmp_path / part)

    with realign(pipe, tmp_path, 0) as dial:
        assert torch.equal(sample(pipe, steps=4, **options), reference)
        dial.lam = LAM
        mixed = sample(pipe, steps=4, **options)
        assert dial.path_kl > 0
    with ByHand(pipe, anchor.state_dict(), (LAM, LAM)).installed():
        expected = sample(pipe, steps=4, **options)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)
    assert (mixed - reference).abs().max() > 1e-3
