"""What the tests of anchor files share: a network with a LoRA merged into it by hand, and whether
an anchor acts as an expected network does.

Shapes: of a LoRA's layer, A (rank, in, ...) and B (out, rank, ...).
"""

from __future__ import annotations

import copy

import pytest
import torch

from deradiff.models.families import FAMILIES, family_of
from deradiff.realignment.context import realign
from tests.support.realign_world import BASES


def denoiser_of(family):
    """The denoiser of the family's tiny pipeline; not to be changed."""
    return getattr(BASES[family], FAMILIES[family].denoiser)


def predict(pipe, denoiser):
    """A denoiser's output on one input."""
    family = family_of(pipe)
    shape = family.latent_shape(pipe, 64)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditioning = family.encode_prompts(pipe, ["a cat"])
        return family.denoise(denoiser, x, torch.tensor([401.0]), conditioning, 64)


def predict_anchor(family, anchor):
    """The output of an anchor, realigned to lam = 1, on the same input."""
    pipe = copy.deepcopy(BASES[family])
    with realign(pipe, anchor, lam=1):
        return predict(pipe, getattr(pipe, FAMILIES[family].denoiser))


def predict_stock(family, folder, **options):
    """The output of the stock pipeline after diffusers has loaded a LoRA, on the same input."""
    pipe = copy.deepcopy(BASES[family])
    pipe.load_lora_weights(folder, **options)
    return predict(pipe, getattr(pipe, FAMILIES[family].denoiser))


def assert_acts_as(family, anchor, expected, atol=2e-5):
    """Assert that the anchor's output is that of an expected network, and not the reference's."""
    output = predict(BASES[family], expected)
    reference = predict(BASES[family], denoiser_of(family))
    assert (output - reference).abs().max() > 50 * atol
    torch.testing.assert_close(predict_anchor(family, anchor), output, rtol=0, atol=atol)


def layers_of(lora):
    """(A, B, scale) of each layer of a network with a peft adapter named `default`."""
    layers = {}
    for name, module in lora.named_modules():
        if hasattr(module, "lora_A"):
            a = module.lora_A["default"].weight
            b = module.lora_B["default"].weight
            layers[name] = (a, b, module.scaling["default"])
    return layers


def merged(family, layers):
    """The reference with W + s B A written into it by hand."""
    network = copy.deepcopy(denoiser_of(family))
    with torch.no_grad():
        for name, (a, b, scale) in layers.items():
            weight = network.get_submodule(name).weight
            weight += scale * (b.flatten(1) @ a.flatten(1)).view_as(weight)
    return network


def with_scales(layers, scales):
    """The layers with other scales, by the layer's name."""
    return {name: (a, b, scales[name]) for name, (a, b, _) in layers.items()}


def refused(family, anchor, message):
    """Assert that realigning is refused in one sentence."""
    with (
        pytest.raises(ValueError, match=message) as error,
        realign(copy.deepcopy(BASES[family]), anchor, 0.5),
    ):
        pass
    assert "\n" not in str(error.value)
