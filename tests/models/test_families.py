"""Which pipelines belong to which family, and what each family asks its denoiser in training."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch.nn import functional

from deradiff.models import flux
from deradiff.models.families import FAMILIES, family_of
from tests.support.tiny_pipelines import (
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
    for kind in KINDS:
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
    if FAMILIES[family].patch_size == 1:
        return output
    return type(pipe)._unpack_latents(output, PIXELS, PIXELS, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_asks_the_denoiser_what_its_pipeline_asks_it(pipes, family):
    """One unguided step of the stock pipeline, overheard, against the same asked in training."""
    pipe = pipes[family]
    denoiser = getattr(pipe, FAMILIES[family].denoiser)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, *FAMILIES[family].latent_shape(pipe, PIXELS), generator=generator)

    # The stock pipeline's step
    heard = []
    listener = denoiser.register_forward_hook(lambda _, inputs, output: heard.append(output[0]))
    # Where guidance is an input of the network, training gives it the pipeline's default
    guidance = 3.5 if FAMILIES[family].guidance_distilled else 1.0
    pipe(
        PROMPTS,
        height=PIXELS,
        width=PIXELS,
        num_inference_steps=1,
        latents=packed(pipe, noisy, family),
        output_type="latent",
        guidance_scale=guidance,
    )
    listener.remove()
    theirs = unpacked(pipe, heard[0], family)

    # Training's
    timesteps = pipe.scheduler.timesteps[0].expand(2)
    with torch.no_grad():
        conditioning = FAMILIES[family].encode_prompts(pipe, PROMPTS)
        ours = FAMILIES[family].denoise(denoiser, noisy, timesteps, conditioning, PIXELS)
    assert ours.shape == noisy.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "channels"), [("sd15", 4), ("sdxl", 4), ("sd3", 16), ("flux", 16)]
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


def test_patches_of_flux_are_those_of_torch_in_the_same_order_in_memory():
    latents = torch.arange(2 * 16 * 6 * 8, dtype=torch.float32).reshape(2, 16, 6, 8)
    patches = functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
    assert torch.equal(flux.pack(latents), patches)
    assert flux.pack(latents).stride() == patches.stride()

    # The order in memory decides in which order a loss adds, and so the last bits of training.
    leaf = patches.clone().requires_grad_()
    back = flux.unpack(leaf, 3, 4)
    shuffled = functional.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (3, 4)), 2)
    assert torch.equal(back, latents)
    assert back.stride() == shuffled.stride()
    (gradient,) = torch.autograd.grad(back.square().sum(), leaf)
    assert gradient.stride() == patches.stride()
