"""Pipelines that put more into the network, or guide it otherwise: T2I-Adapter and PAG.

The mixture is compared with the stock pipeline on a network whose forward mixes two by hand.
"""

import copy

import pytest
import torch
from diffusers import (
    StableDiffusionAdapterPipeline,
    StableDiffusionPAGPipeline,
    T2IAdapter,
)
from PIL import Image

from deradiff.realignment.context import realign

LAM = 0.4
TOLERANCE = 1e-4
"""Of latents that lie within about 10."""


def components_of(pipe):
    """The parts of a plain SD1.5 pipeline, copied."""
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    return {name: copy.deepcopy(getattr(pipe, name)) for name in names} | {
        "safety_checker": None,
        "feature_extractor": None,
    }


def with_t2i_adapter(pipe):
    """A pipeline that adds a picture's features to the UNet's, in lists that the UNet empties."""
    torch.manual_seed(0)
    channels = list(pipe.unet.config.block_out_channels)
    adapter = T2IAdapter(
        in_channels=3,
        channels=channels,
        num_res_blocks=1,
        downscale_factor=16,
        adapter_type="full_adapter",
    )
    # The tiny UNet's two blocks have latents of one size where features are added.
    adapter.adapter.body[1].downsample = None
    parts = components_of(pipe)
    return StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)


def with_pag(pipe):
    """A pipeline of perturbed attention: three branches, and processors of its own."""
    parts = components_of(pipe)
    return StableDiffusionPAGPipeline(
        **parts, requires_safety_checker=False, pag_applied_layers=["mid"]
    )


PIPELINES = {
    "t2i_adapter": (with_t2i_adapter, {"image": [Image.new("RGB", (64, 64), (30, 60, 200))] * 2}),
    "pag": (with_pag, {"pag_scale": 2.0}),
}


def sample(pipe, options):
    """Latents of two prompts."""
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipe(
        ["a red fox", "a blue cat"],
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=generators,
        output_type="latent",
        **options,
    ).images


def mix_by_hand(unet, anchor, lam):
    """Have a UNet return a mixture with another one, on arguments of its own for each."""
    own_forward = unet.forward

    def forward(*args, **kwargs):
        anchor.set_attn_processor(dict(unet.attn_processors))
        outputs = []
        for network in (own_forward, anchor):
            own_args, own_kwargs = copy.deepcopy((args, kwargs))
            outputs.append(network(*own_args, **own_kwargs)[0])
        return (torch.lerp(*outputs, lam),)

    unet.forward = forward


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_the_mixture_is_that_of_two_stock_networks(sd15, name):
    make, options = PIPELINES[name]
    expected = {}
    anchor = sd15.stock("full1").unet
    for lam in (0.0, LAM, 1.0):
        by_hand = make(sd15.pipe)
        mix_by_hand(by_hand.unet, anchor, lam)
        expected[lam] = sample(by_hand, options)

    pipe = make(sd15.pipe)
    plain = sample(pipe, options)
    torch.testing.assert_close(plain, expected[0.0], rtol=0, atol=TOLERANCE)
    with realign(pipe, sd15.anchors["full1"], LAM) as dial:
        mixture = sample(pipe, options)
        torch.testing.assert_close(mixture, expected[LAM], rtol=0, atol=TOLERANCE)
        assert dial.path_kl.gt(0).all()
        dial.lam = 1.0
        torch.testing.assert_close(sample(pipe, options), expected[1.0], rtol=0, atol=TOLERANCE)
    assert torch.equal(sample(pipe, options), plain)
    assert (mixture - plain).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_what_such_a_pipeline_adds_counts(sd15, name):
    """Otherwise the test above would say nothing about it."""
    make, options = PIPELINES[name]
    weaker = {"t2i_adapter": {"adapter_conditioning_scale": 0.0}, "pag": {"pag_scale": 0.0}}
    pipe = make(sd15.pipe)
    changed = sample(pipe, options | weaker[name])
    assert (changed - sample(pipe, options)).abs().max() > 100 * TOLERANCE
