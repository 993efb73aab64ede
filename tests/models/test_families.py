"""Which pipelines belong to which family, and what each family asks its denoiser in training."""

from __future__ import annotations

import diffusers
import pytest
import torch

from deradiff.models.families import FAMILIES, family_of
from tests.support.tiny_pipelines import (
    EVERY_KIND,
    KINDS,
    SIDE,
    TINY,
    tiny_denoiser,
    tiny_pipeline,
    tiny_variant,
)

PROMPTS = ["a cat", "two dogs"]
PIXELS = 8 * SIDE
FOREIGN = [  # each begins as a family's name does, or has a family's denoiser
    "StableDiffusionUpscalePipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusion3PAGPipeline",
    "StableDiffusionXLPAGInpaintPipeline",
    "StableDiffusionLatentUpscalePipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "Flux2Pipeline",
    "FluxKontextPipeline",
    "FluxFillPipeline",
    "FluxControlPipeline",
    "FluxControlInpaintPipeline",
    "KolorsPipeline",
]


def pipeline_with(class_name, denoiser_of):
    """An object of a pipeline's class name that has another family's denoiser."""
    denoiser = {FAMILIES[denoiser_of].denoiser: tiny_denoiser(denoiser_of)}
    return type(class_name, (), denoiser)()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_of_any_kind_is_of_its_family(pipes, family):
    kinds = KINDS if family in EVERY_KIND else ["text2img"]
    for kind in kinds:
        if kind not in TINY[family].missing_kinds:
            assert family_of(tiny_variant(pipes[family], kind)).name == family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_denoiser_and_a_subclass_of_a_pipeline_are_seen_through(family):
    pipe = tiny_pipeline(family)
    name = FAMILIES[family].denoiser
    setattr(pipe, name, torch.compile(getattr(pipe, name)))
    assert family_of(pipe).name == family
    pipe.__class__ = type("Ours", (type(pipe),), {})
    assert family_of(pipe).name == family


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_what_is_of_no_family_is_refused(family, name):
    assert hasattr(diffusers, name), "diffusers still has it"
    message = rf"the pipeline is a {name} with a .*belongs to no family .*sd15, sdxl, sd3, flux"
    with pytest.raises(ValueError, match=message):
        family_of(pipeline_with(name, denoiser_of=family))


@pytest.mark.parametrize(("family", "other"), [("sd3", "flux"), ("flux", "sd3"), ("sd15", "flux")])
def test_the_denoiser_decides_too(family, other):
    pipeline = FAMILIES[family].pipeline
    message = f"a {pipeline} with a {FAMILIES[other].denoiser_class}"
    with pytest.raises(ValueError, match=message):
        family_of(pipeline_with(pipeline, denoiser_of=other))


def packed(pipe, latents, family):
    """Latents as the pipeline's call takes them."""
    if FAMILIES[family].patch_size == 1:
        return latents
    return type(pipe)._pack_latents(latents, *latents.shape)


def unpacked(pipe, output, family):
    """What the scheduler is given, in the shape of the latents (B, C, H, W)."""
    if FAMILIES[family].patch_size == 1:
        return output
    latents = type(pipe)._unpack_latents(output, PIXELS, PIXELS, 8)
    return latents.squeeze(2) if latents.ndim == 5 else latents  # an image is a video of one frame


def given_to_the_scheduler(pipe, latents, family):
    """What one unguided step of the stock pipeline on PROMPTS gives to its scheduler."""
    steps = []
    own_step = pipe.scheduler.step

    def step(output, *args, **kwargs):
        steps.append(output.clone())
        return own_step(output, *args, **kwargs)

    # Where guidance is an input of the network, training gives it the family's default
    kind = FAMILIES[family]
    guidance = kind.sampling.guidance_scale if kind.guidance_distilled else kind.no_guidance
    pipe.scheduler.step = step
    try:
        pipe(
            PROMPTS,
            height=PIXELS,
            width=PIXELS,
            num_inference_steps=1,
            latents=packed(pipe, latents, family),
            output_type="latent",
            **{kind.guidance_argument: guidance},
        )
    finally:
        del pipe.scheduler.step
    return unpacked(pipe, steps[0], family)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_asks_the_denoiser_what_its_pipeline_asks_it(pipes, family):
    """One unguided step of the stock pipeline, overheard, against the same asked in training."""
    pipe = pipes[family]
    denoiser = getattr(pipe, FAMILIES[family].denoiser)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, *FAMILIES[family].latent_shape(pipe, PIXELS), generator=generator)
    theirs = given_to_the_scheduler(pipe, noisy, family)

    timesteps = pipe.scheduler.timesteps[0].expand(2)
    with torch.no_grad():
        conditioning = FAMILIES[family].encode_prompts(pipe, PROMPTS)
        ours = FAMILIES[family].denoise(denoiser, noisy, timesteps, conditioning, PIXELS)
    assert ours.shape == noisy.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_output(family):
    """Training asks the same of the network, whether it saves memory or not."""
    pipe = tiny_pipeline(family)
    kind = FAMILIES[family]
    denoiser = getattr(pipe, kind.denoiser).train()
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, *kind.latent_shape(pipe, PIXELS), generator=generator)
    timesteps = torch.tensor([400.0, 600.0])
    with torch.no_grad():
        conditioning = kind.encode_prompts(pipe, PROMPTS)
    plain = kind.denoise(denoiser, noisy, timesteps, conditioning, PIXELS)
    denoiser.enable_gradient_checkpointing()
    checkpointed = kind.denoise(denoiser, noisy, timesteps, conditioning, PIXELS)
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "channels"),
    [("sd15", 4), ("sdxl", 4), ("sd3", 16), ("flux", 16), ("qwen_image", 4)],
)
def test_latents_have_the_familys_shape(pipes, family, channels):
    assert FAMILIES[family].latent_shape(pipes[family], PIXELS) == (channels, SIDE, SIDE)
    message = f"multiples of {FAMILIES[family].multiple} pixels, and 63 is not one"
    with pytest.raises(ValueError, match=message):
        FAMILIES[family].latent_shape(pipes[family], 63)


def test_oblong_latents_keep_their_rows_and_columns(pipes):
    """FLUX tells a patch from its place; a transposed image is another question."""
    flux = FAMILIES["flux"]
    transformer = pipes["flux"].transformer
    timesteps = torch.tensor([500.0])
    wide = torch.randn(1, 16, 4, 8, generator=torch.Generator().manual_seed(0))
    high = wide.transpose(2, 3).contiguous()
    prompt = flux.encode_prompts(pipes["flux"], ["x"])
    with torch.no_grad():
        wide_output = flux.denoise(transformer, wide, timesteps, prompt, PIXELS)
        high_output = flux.denoise(transformer, high, timesteps, prompt, PIXELS)
    assert wide_output.shape == wide.shape
    assert not torch.allclose(wide_output, high_output.transpose(2, 3), atol=1e-3)
