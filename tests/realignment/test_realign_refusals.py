"""Mistakes that `realign` meets: each is answered in one sentence, before a weight is read where
that is possible, and nothing is left behind."""

import math
import warnings

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file

from deradiff.anchors.anchor import AnchorCard, load_anchor, save_anchor
from deradiff.realignment.context import realign
from deradiff.realignment.dial import BeyondAnchorWarning
from tests.support.realign_world import fingerprint, sample
from tests.support.tiny_pipelines import perturbed_denoiser, tiny_denoiser, tiny_lora


def refused(pipe, anchor, lam, message, **options):
    """Assert that realigning raises ValueError with this message."""
    with pytest.raises(ValueError, match=message), realign(pipe, anchor, lam, **options):
        pass


@pytest.mark.parametrize("lam", [math.nan, math.inf, "0.5", None, True, [0.5, 0.5], []])
def test_a_value_that_is_no_lam_is_refused(sd15, lam):
    message = r"lam must be a finite number|as many values of lam"
    refused(sd15.pipe, sd15.anchors["full1"], lam, message)


def test_a_lam_beyond_the_anchor_warns_once(sd15):
    warned = pytest.warns(BeyondAnchorWarning, match=r"lies beyond the anchor.*ancestral")
    with warned as caught, realign(sd15.pipe, sd15.anchors["full1"], 1.5) as dial:
        dial.lam = 2
        assert dial.lam == 2.0
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with realign(sd15.pipe, sd15.anchors["full1"], 1):
            pass


def test_mistakes_are_answered_before_a_weight_is_read(sd15, tmp_path, worlds):
    missing = tmp_path / "none"
    unknown = "mode must be exact, reuse, weights or sampled, not 'fast'"
    refused(sd15.pipe, missing, 0.5, unknown, mode="fast")
    refused(sd15.pipe, missing, 0.5, "there is no anchor .*none")
    other_family = "is of family sdxl and the pipeline of sd15"
    refused(sd15.pipe, worlds["sdxl"].anchors["lora1"], 0.5, other_family)
    sd15.pipe.scheduler = DDPMScheduler(variance_type="learned_range")
    refused(sd15.pipe, missing, 0.5, "DDPMScheduler has a learned variance")


def test_realigning_twice_at_once_is_refused(sd15):
    with realign(sd15.pipe, sd15.anchors["full1"], 0.5):
        refused(sd15.pipe, sd15.anchors["lora1"], 0.5, "realigned already")
        sample(sd15.pipe)


@pytest.mark.parametrize("method", ["full1", "lora1"])
def test_an_anchor_of_other_layers_or_sizes_is_refused_naming_both(sd15, worlds, tmp_path, method):
    # One of the family with a layer of another size.
    narrow = tiny_denoiser("sd15", cross_attention_dim=24)
    network = perturbed_denoiser(narrow) if method == "full1" else tiny_lora(narrow)
    card = AnchorCard(base_model="x", family="sd15", method=method[:4], beta=1)
    save_anchor(tmp_path / "narrow", network, card)

    # One of another family which only its layers tell, as a LoRA of other trainers.
    foreign = load_anchor(worlds["sdxl"].anchors[method])
    foreign.family = None
    foreign.card = None

    before = fingerprint(sd15.pipe.unet)
    for anchor in (tmp_path / "narrow", foreign):
        message = r"anchor .*does not (fit|bind to) the sd15 pipeline"
        refused(sd15.pipe, anchor, 0.5, message)
    assert fingerprint(sd15.pipe.unet) == before


def test_a_lora_that_is_not_on_the_unet_alone_is_refused(sd15, tmp_path):
    layer = {"x.lora_A.weight": torch.zeros(2, 4), "x.lora_B.weight": torch.ones(4, 2)}
    sd15.pipe.save_lora_weights(tmp_path, text_encoder_lora_layers=layer)
    refused(sd15.pipe, tmp_path, 0.5, r"also changes the text encoder \(text_encoder")


def test_a_file_that_is_no_lora_is_refused(sd15, tmp_path):
    save_file({"unet.conv_in.weight": torch.zeros(2, 4)}, tmp_path / "other.safetensors")
    message = r"other\.safetensors|does not hold a UNet2DConditionModel"
    refused(sd15.pipe, tmp_path, 0.5, message)


def test_fused_weights_of_another_lora_are_refused(sd15):
    sd15.pipe.load_lora_weights(sd15.anchors["lora2"])
    sd15.pipe.fuse_lora()
    refused(sd15.pipe, sd15.anchors["lora1"], 0.5, r"call pipe.unfuse_lora\(\) first")
