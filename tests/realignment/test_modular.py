"""The dial in modular pipelines, whose guidance is an object and whose loop is a block."""

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks

from deradiff.realignment.context import realign
from tests.support.realign_world import fingerprint

SCALE = 5.0
GUIDERS = {
    "classifier-free": lambda: ClassifierFreeGuidance(guidance_scale=SCALE),
    "projected": lambda: AdaptiveProjectedGuidance(guidance_scale=SCALE),
}


def modular(pipe, guider="classifier-free"):
    """A modular pipeline of the same components."""
    blocks = StableDiffusionXLAutoBlocks().init_pipeline()
    components = {}
    for name, component in pipe.components.items():
        if component is not None and name in blocks._component_specs:
            components[name] = component
    blocks.update_components(**components, guider=GUIDERS[guider]())
    blocks.set_progress_bar_config(disable=True)
    return blocks


def sample(pipe, **options):
    """Latents (1, 4, 8, 8) of one prompt."""
    return pipe(
        prompt="a cat",
        negative_prompt="",
        num_inference_steps=3,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    )


@pytest.fixture
def sdxl(worlds):
    return worlds["sdxl"].copy()


@pytest.mark.parametrize("guider", GUIDERS)
@pytest.mark.parametrize("anchor", ["full1", "lora1"])
def test_the_ends_are_stock_modular_pipelines_and_all_is_restored(sdxl, anchor, guider):
    pipe = modular(sdxl.pipe, guider)
    before = fingerprint(sdxl.pipe.unet)
    reference = sample(pipe, output="latents")
    anchored = sample(modular(sdxl.stock(anchor), guider), output="latents")
    with realign(pipe, sdxl.anchors[anchor], 0) as dial:
        assert torch.equal(sample(pipe, output="latents"), reference)
        dial.lam = 1
        assert torch.equal(sample(pipe, output="latents"), anchored)
        dial.lam = 0.5
        middle = sample(pipe, output="latents")
        assert dial.path_kl.gt(0).all()
        assert dial.evaluations == 2
    assert not torch.equal(middle, reference)
    assert not torch.equal(middle, anchored)
    assert fingerprint(sdxl.pipe.unet) == before


def test_a_guider_is_measured_as_the_same_guidance_in_a_plain_pipeline(sdxl):
    """Two calls of the network in one form, one batch in the other."""
    with realign(sdxl.pipe, sdxl.anchors["full1"], 0.5) as dial:
        images = sample(sdxl.pipe, guidance_scale=SCALE).images
        path_kl = dial.path_kl
    pipe = modular(sdxl.pipe)
    with realign(pipe, sdxl.anchors["full1"], 0.5) as dial:
        torch.testing.assert_close(sample(pipe, output="latents"), images, rtol=0, atol=1e-3)
        torch.testing.assert_close(dial.path_kl, path_kl, rtol=1e-3, atol=0)


def test_projected_guidance_which_is_not_linear_is_followed(sdxl):
    """The path KL at a small lambda is that of its derivative: it falls with the square."""
    pipe = modular(sdxl.pipe, "projected")
    path_kls = []
    for lam in (0.02, 0.01):
        with realign(pipe, sdxl.anchors["full1"], lam) as dial:
            sample(pipe, output="latents")
            path_kls.append(float(dial.path_kl))
    assert path_kls[0] / path_kls[1] == pytest.approx(4, rel=0.1)
