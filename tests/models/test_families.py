"""Which pipelines belong to which family, and what each family asks its denoiser in training."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch.nn import functional

from deradiff.models.families import FAMILIES, family_of
from deradiff.models.patches import pack, unpack
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
    "FluxKontextPipeline",
    "FluxFillPipeline",
    "FluxControlPipeline",
    "FluxControlInpaintPipeline",
    "KolorsPipeline",
    "Flux2KleinKVPipeline",
    "QwenImageEditPipeline",
    "SanaSprintPipeline",
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
    if hasattr(pipe, "_patchify_latents"):
        return pipe._patchify_latents(latents)
    return type(pipe)._pack_latents(latents, *latents.shape)


def unpacked(pipe, output, family):
    """What the scheduler is given, in the shape of the latents (B, C, H, W)."""
    if FAMILIES[family].patch_size == 1:
        return output
    if hasattr(pipe, "_patchify_latents"):
        ids = pipe._prepare_latent_ids(torch.zeros(len(output), 16, SIDE // 2, SIDE // 2))
        return pipe._unpatchify_latents(pipe._unpack_latents_with_ids(output, ids))
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
            prompt=list(PROMPTS),  # Z-Image's pipeline writes its template into the list
            height=PIXELS,
            width=PIXELS,
            num_inference_steps=1,
            latents=packed(pipe, latents, family),
            output_type="latent",
            **{kind.guidance_argument: guidance},
            **dict(kind.call_options),
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


CHANNELS = {
    "sd15": 4,
    "sdxl": 4,
    "sd3": 16,
    "flux": 16,
    "qwen_image": 4,
    "z_image": 16,
    "chroma": 16,
    "flux2_klein": 4,
    "flux2": 4,
    "sana": 4,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_have_the_familys_shape(pipes, family):
    pipe = pipes[family]
    side = PIXELS // pipe.vae_scale_factor
    assert FAMILIES[family].latent_shape(pipe, PIXELS) == (CHANNELS[family], side, side)
    message = f"multiples of {FAMILIES[family].multiple} pixels, and 63 is not one"
    with pytest.raises(ValueError, match=message):
        FAMILIES[family].latent_shape(pipes[family], 63)


@pytest.mark.parametrize("family", FAMILIES)
def test_oblong_latents_keep_their_rows_and_columns(pipes, family):
    """A network that tells a patch by its place gives another answer to a transposed image."""
    kind = FAMILIES[family]
    pipe = pipes[family]
    channels = kind.latent_channels(pipe.vae.config)
    timesteps = torch.tensor([500.0])
    wide = torch.randn(1, channels, 4, 8, generator=torch.Generator().manual_seed(0))
    high = wide.transpose(2, 3).contiguous()
    with torch.no_grad():
        prompt = kind.encode_prompts(pipe, ["x"])
        denoiser = getattr(pipe, kind.denoiser)
        wide_output = kind.denoise(denoiser, wide, timesteps, prompt, PIXELS)
        high_output = kind.denoise(denoiser, high, timesteps, prompt, PIXELS)
    assert wide_output.shape == wide.shape
    assert not torch.allclose(wide_output, high_output.transpose(2, 3), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_caption_is_the_same_in_every_batch(pipes, family):
    """Longer captions beside it, and the padding of a cache, change it by rounding at most."""
    kind = FAMILIES[family]
    pipe = pipes[family]
    denoiser = getattr(pipe, kind.denoiser)
    noisy = torch.randn(1, *kind.latent_shape(pipe, PIXELS))
    captions = ["a cat", "a much longer caption, of two red dogs on a green bench"]
    outputs = []
    with torch.no_grad():
        for batch in (captions[:1], captions):
            rows = kind.encode_prompts(pipe, batch)
            latents = noisy.expand(len(batch), -1, -1, -1)
            timesteps = torch.full((len(batch),), 500.0)
            outputs.append(kind.denoise(denoiser, latents, timesteps, rows, PIXELS)[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)


def test_chromas_single_blocks_get_the_mask_where_memory_is_saved(pipes):
    """diffusers alone gives it to the double blocks only."""
    chroma = FAMILIES["chroma"]
    network = tiny_pipeline("chroma").transformer.train()
    network.enable_gradient_checkpointing()
    inputs = []
    checkpoint = network._gradient_checkpointing_func

    def listen(block, *arguments):
        inputs.append(len(arguments))
        return checkpoint(block, *arguments)

    network._gradient_checkpointing_func = listen
    with torch.no_grad():
        rows = chroma.encode_prompts(pipes["chroma"], ["a cat"])
    noisy = torch.randn(1, *chroma.latent_shape(pipes["chroma"], PIXELS))
    chroma.denoise(network, noisy, torch.tensor([500.0]), rows, PIXELS)
    assert inputs == [5, 4], "a double block, and a single one with the mask"
    assert network._gradient_checkpointing_func is listen


def test_patches_of_flux_are_those_of_torch_in_the_same_order_in_memory():
    latents = torch.arange(2 * 16 * 6 * 8, dtype=torch.float32).reshape(2, 16, 6, 8)
    patches = functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
    assert torch.equal(pack(latents), patches)
    assert pack(latents).stride() == patches.stride()

    # The order in memory decides in which order a loss adds, and so the last bits of training. A
    # network's output is contiguous.
    output = patches.contiguous()
    back = unpack(output, 3, 4)
    shuffled = functional.pixel_shuffle(output.transpose(1, 2).unflatten(2, (3, 4)), 2)
    assert torch.equal(back, latents)
    assert back.stride() == shuffled.stride()
