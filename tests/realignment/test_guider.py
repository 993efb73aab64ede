"""`RealignGuidance`, a guider that realigns the modular pipeline it is in, as the context does."""

import gc

import diffusers
import pytest
import torch
from diffusers import ClassifierFreeGuidance, ComponentsManager, HeunDiscreteScheduler

import deradiff
from deradiff.method.branches import ByBranch
from deradiff.method.lambdas import ramp
from deradiff.realignment.context import HOOK, realign
from deradiff.realignment.guider import RealignGuidance
from tests.support.modular_pipelines import (
    GUIDERS,
    SCALE,
    modular,
    sample,
    save_anchors,
    tiny_modular,
)
from tests.support.products import sparse_product
from tests.support.realign_world import fingerprint

LAM = 0.4


@pytest.fixture
def sdxl(worlds):
    return worlds["sdxl"].copy()


@pytest.fixture
def pipe(sdxl):
    return modular(sdxl.pipe, ClassifierFreeGuidance(SCALE))


@pytest.fixture
def anchor(sdxl):
    return sdxl.anchors["full1"]


def in_context(pipe, anchor, lam, steps=3, **options):
    """Latents, path KL and evaluations of the pipeline within `realign`."""
    with realign(pipe, anchor, lam, **options) as dial:
        x = sample(pipe, steps)
        return x, dial.path_kl, dial.evaluations


class Interrupted(Exception):
    """What a user's interruption is to the pipeline."""


def interrupt(pipe):
    """A call that ends within its second step, in the network."""
    forward = pipe.unet.conv_out.forward
    evaluations = []

    def fail(x):
        evaluations.append(x)
        if len(evaluations) > 5:
            raise Interrupted
        return forward(x)

    pipe.unet.conv_out.forward = fail
    with pytest.raises(Interrupted):
        sample(pipe)
    del pipe.unet.conv_out.forward


@pytest.mark.parametrize(
    ("method", "mode"),
    sparse_product(["full1", "lora1"], ["exact", "reuse", "weights", "sampled"]),
)
def test_it_is_the_context_bit_for_bit_and_leaves_no_trace(sdxl, pipe, method, mode):
    anchor = sdxl.anchors[method]
    reference = sample(pipe)
    x, path_kl, evaluations = in_context(pipe, anchor, LAM, mode=mode)
    before = fingerprint(sdxl.pipe.unet)
    guider = pipe.guider
    pipe.update_components(guider=RealignGuidance(guider, anchor, LAM, mode=mode))
    for _ in range(2):
        assert torch.equal(sample(pipe), x)
        assert torch.equal(pipe.guider.dial.path_kl.nan_to_num(-1), path_kl.nan_to_num(-1))
        assert pipe.guider.dial.evaluations == evaluations
        assert fingerprint(sdxl.pipe.unet) == before
    pipe.update_components(guider=guider)
    assert torch.equal(sample(pipe), reference)


@pytest.mark.parametrize("guider", GUIDERS)
def test_it_wraps_any_guider(sdxl, anchor, guider):
    x, path_kl, _ = in_context(modular(sdxl.pipe, GUIDERS[guider]()), anchor, LAM)
    pipe = modular(sdxl.pipe, RealignGuidance(GUIDERS[guider](), anchor, LAM))
    assert torch.equal(sample(pipe), x)
    assert torch.equal(pipe.guider.dial.path_kl, path_kl)


@pytest.mark.parametrize("name", ["sd3", "qwen_image", "flux2_klein base", "z_image"])
def test_it_is_in_every_pipeline_that_has_a_guider(tmp_path, name):
    pipe = tiny_modular(name)
    anchor = save_anchors(pipe, tmp_path, name.removesuffix(" base"))["lora"]
    x, path_kl, _ = in_context(pipe, anchor, LAM)
    pipe.update_components(guider=RealignGuidance(pipe.guider, anchor, LAM))
    assert torch.equal(sample(pipe), x)
    assert torch.equal(pipe.guider.dial.path_kl, path_kl)


def test_lambda_and_steps_change_between_calls(pipe, anchor):
    expected = [in_context(pipe, anchor, lam, steps)[0] for lam, steps in ((0.2, 3), (0.9, 5))]
    pipe.update_components(guider=RealignGuidance(pipe.guider, anchor, 0.2))
    assert torch.equal(sample(pipe, 3), expected[0])
    pipe.guider.lam = 0.9
    assert pipe.guider.lam == 0.9
    assert torch.equal(sample(pipe, 5), expected[1])


def test_lambda_changes_within_a_call(pipe, anchor):
    expected = in_context(pipe, anchor, lambda fraction: 0.2 if fraction < 0.5 else 0.9)[0]
    guider = RealignGuidance(pipe.guider, anchor, 0.2)
    set_state = guider.set_state

    def turn(step, **state):
        set_state(step=step, **state)
        if step == 1:
            guider.lam = 0.9

    guider.set_state = turn
    pipe.update_components(guider=guider)
    assert torch.equal(sample(pipe), expected)
    guider.lam = 0.2
    assert torch.equal(sample(pipe), expected)


def test_several_anchors_schedules_and_branches(sdxl, pipe):
    anchors = [sdxl.anchors["full1"], sdxl.anchors["lora2"]]
    lams = [ramp(0.2, 0.6), ByBranch(0.3, 0.1)]
    x = in_context(pipe, anchors, lams)[0]
    pipe.update_components(guider=RealignGuidance(pipe.guider, anchors, lams))
    assert torch.equal(sample(pipe), x)
    assert pipe.guider.lam == lams


def test_a_scheduler_of_two_stages_is_one_chain(sdxl, pipe, anchor):
    scheduler = HeunDiscreteScheduler.from_config(sdxl.pipe.scheduler.config)
    pipe.update_components(scheduler=scheduler)
    x, path_kl, _ = in_context(pipe, anchor, LAM)
    before = fingerprint(pipe.unet)
    # diffusers' guider remembers its last step, which lies beyond the steps that it was told.
    guider = RealignGuidance(ClassifierFreeGuidance(SCALE), anchor, LAM)
    pipe.update_components(guider=guider)
    assert torch.equal(sample(pipe), x)
    assert torch.equal(guider.dial.path_kl, path_kl)
    assert fingerprint(pipe.unet) == before


def test_an_interrupted_call_does_no_harm(sdxl, pipe, anchor):
    guider = pipe.guider
    reference = sample(pipe)
    x = in_context(pipe, anchor, LAM)[0]
    before = fingerprint(pipe.unet)

    # The same guider begins anew.
    pipe.update_components(guider=RealignGuidance(guider, anchor, LAM))
    interrupt(pipe)
    assert torch.equal(sample(pipe), x)
    assert fingerprint(pipe.unet) == before

    # Another guider finds the network as it was.
    interrupted = pipe.guider
    interrupt(pipe)
    pipe.update_components(guider=guider)
    assert torch.equal(sample(pipe), reference)
    assert fingerprint(pipe.unet) == before
    assert interrupted.dial is not None


def test_a_guider_that_is_gone_has_given_the_network_back(pipe, anchor):
    guider = pipe.guider
    before = fingerprint(pipe.unet)
    pipe.update_components(guider=RealignGuidance(guider, anchor, LAM))
    interrupt(pipe)
    assert pipe.unet._diffusers_hook.get_hook(HOOK) is not None
    pipe.guider.release()
    assert fingerprint(pipe.unet) == before
    interrupt(pipe)
    pipe.update_components(guider=guider)
    gc.collect()
    assert fingerprint(pipe.unet) == before


def test_the_wrapped_guider_is_set_through_it(pipe, anchor):
    guider = RealignGuidance(pipe.guider, anchor, LAM)
    pipe.update_components(guider=guider)
    guider.guidance_scale = 2.0
    assert guider.guider.guidance_scale == guider.guidance_scale == 2.0
    x = sample(pipe)
    pipe.update_components(guider=ClassifierFreeGuidance(2.0))
    assert torch.equal(x, in_context(pipe, anchor, LAM)[0])
    guider.disable()
    assert guider.num_conditions == 1
    assert guider.get_state() == guider.guider.get_state()


def test_it_is_saved_with_its_anchors_by_path(tmp_path, sdxl, anchor):
    guider = RealignGuidance(GUIDERS["skip layer"](), anchor, LAM, path_kl=True)
    guider.lam = 0.7
    guider.save_pretrained(tmp_path)
    loaded = RealignGuidance.from_pretrained(tmp_path)
    assert loaded.lam == 0.7
    assert loaded.config["anchor"] == [str(anchor)]
    assert loaded.config == guider.config
    x = sample(modular(sdxl.pipe, guider))
    assert torch.equal(sample(modular(sdxl.pipe, loaded)), x)
    assert torch.equal(sample(modular(sdxl.pipe, guider.new())), x)
    assert guider.new(lam=0.1).lam == 0.1


def test_a_config_holds_no_schedule(tmp_path, pipe, anchor):
    guider = RealignGuidance(pipe.guider, anchor, ramp(1, 0.2))
    with pytest.raises(ValueError, match="no tensor, schedule or lam of a branch"):
        guider.save_pretrained(tmp_path)


def test_it_is_a_component_of_a_manager_like_others(sdxl, anchor):
    expected = in_context(modular(sdxl.pipe, ClassifierFreeGuidance(SCALE)), anchor, LAM)[0]
    pipe = modular(sdxl.pipe, RealignGuidance(ClassifierFreeGuidance(SCALE), anchor, LAM))
    manager = ComponentsManager()
    for name, component in pipe.components.items():
        if component is not None:
            manager.add(name, component)
    assert torch.equal(sample(pipe), expected)


def test_what_it_cannot_do_is_said(sdxl, pipe, anchor):
    with pytest.raises(ValueError, match="lam must be"):
        RealignGuidance(pipe.guider, anchor, "much")
    with pytest.raises(ValueError, match="wraps a guider of diffusers"):
        RealignGuidance(None, anchor, LAM)
    guider = RealignGuidance(pipe.guider, anchor, LAM)
    with pytest.raises(ValueError, match="does not wrap another one"):
        RealignGuidance(guider, anchor, LAM)
    with pytest.raises(ValueError, match="values of lam"):
        guider.lam = [0.1, 0.2]
    with pytest.raises(ValueError, match="the modular pipeline whose guider it is"):
        guider.set_state(step=0, num_inference_steps=3, timestep=torch.tensor(1))


def test_a_pipeline_of_several_guiders_is_refused(anchor):
    """Wan 2.2 has one for each denoiser, and LTX-2 one for sound."""
    pipe = diffusers.Wan22Blocks().init_pipeline()
    guider = RealignGuidance(ClassifierFreeGuidance(), anchor, LAM)
    pipe.update_components(guider=guider)
    with pytest.raises(ValueError, match="has several guiders"):
        guider.check_pipeline(pipe)


def test_it_does_not_go_together_with_the_context(pipe, anchor):
    pipe.update_components(guider=RealignGuidance(pipe.guider, anchor, LAM))
    with realign(pipe, anchor, LAM), pytest.raises(ValueError, match="being realigned already"):
        sample(pipe)


def test_it_is_a_public_name():
    assert deradiff.RealignGuidance is RealignGuidance
