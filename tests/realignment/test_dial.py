"""The dial in a notebook: without a `with` block, shown, mistyped, after its end, and with anchors
that are in memory."""

import pytest
import torch
from torch import nn

import deradiff
from deradiff.anchors.live import live_anchor
from deradiff.realignment.context import realign
from tests.support.realign_world import denoise, fingerprint, sample


def test_a_dial_without_a_block_acts_until_it_is_closed(sd15):
    before = fingerprint(sd15.pipe.unet)
    reference = sample(sd15.pipe)
    dial = realign(sd15.pipe, sd15.anchors["lora1"], lam=1)
    try:
        assert torch.equal(sample(sd15.pipe), sample(sd15.stock("lora1")))
        dial.lam = 0
        assert torch.equal(sample(sd15.pipe), reference)
    finally:
        dial.close()
    dial.close()
    assert fingerprint(sd15.pipe.unet) == before
    assert torch.equal(sample(sd15.pipe), reference)


def test_an_error_in_the_block_and_one_on_the_way_give_the_pipeline_back(sd15, monkeypatch):
    before = fingerprint(sd15.pipe.unet)
    with pytest.raises(KeyError), realign(sd15.pipe, sd15.anchors["lora1"], 0.5):
        raise KeyError
    assert fingerprint(sd15.pipe.unet) == before

    monkeypatch.setattr("deradiff.realignment.context._Hook", None)
    with pytest.raises(TypeError):
        realign(sd15.pipe, sd15.anchors["lora1"], 0.5)
    assert fingerprint(sd15.pipe.unet) == before


def test_a_dial_shows_lambda_and_what_the_last_call_cost(sd15):
    with realign(sd15.pipe, sd15.anchors["full1"], lam=0.5) as dial:
        assert repr(dial) == "Dial(lam=0.5)"
        sample(sd15.pipe)
        first, second = dial.path_kl.tolist()
        measured = f"path_kl=[{first:.3g}, {second:.3g}], evaluations=2"
        assert repr(dial) == f"Dial(lam=0.5, {measured})"
        dial.lam = torch.tensor([0.0, 0.5])
        assert repr(dial).startswith("Dial(lam=[0, 0.5], ")
        dial.lam = torch.zeros(8, 6)
        assert repr(dial).startswith("Dial(lam=mask of 8x6, ")
        dial.lam = deradiff.ramp(1, 0.2)
        assert repr(dial).startswith("Dial(lam=schedule, ")
        dial.lam = deradiff.ByBranch(0.5, 0)
        assert repr(dial).startswith("Dial(lam=ByBranch(0.5, 0), ")
    assert repr(dial).endswith(", closed)")
    anchors = [sd15.anchors["full1"], sd15.anchors["lora1"]]
    with realign(sd15.pipe, anchors, lam=[0.5, 0.25]) as dial:
        assert repr(dial) == "Dial(lam=[0.5, 0.25])"


def test_a_slip_of_the_keyboard_does_not_go_by_unseen(sd15):
    with realign(sd15.pipe, sd15.anchors["full1"], lam=0.5) as dial:
        with pytest.raises(AttributeError, match=r"a dial has no lambda_ to be set: set dial\.lam"):
            dial.lambda_ = 0.25
        assert dial.lam == 0.5


def test_a_dial_whose_block_has_ended_says_so(sd15):
    with realign(sd15.pipe, sd15.anchors["full1"], lam=0.5) as dial:
        sample(sd15.pipe)
    with pytest.raises(ValueError, match="its pipeline was given back: call realign again"):
        dial.lam = 0.25
    with pytest.raises(ValueError, match="call realign again"), dial:
        pass
    assert dial.lam == 0.5 and (dial.path_kl > 0).all(), "what it measured can still be read"


@pytest.mark.parametrize("is_pipeline", [True, False])
def test_an_aligned_model_in_memory_is_an_anchor(sd15, is_pipeline):
    stock = sd15.stock("full1")
    before = fingerprint(stock.unet)
    with realign(sd15.pipe, sd15.anchors["full1"], lam=0.5):
        expected = denoise(sd15.pipe.unet)
    with realign(sd15.pipe, stock if is_pipeline else stock.unet, lam=0.5) as dial:
        assert torch.equal(denoise(sd15.pipe.unet), expected)
        dial.lam = 1
        assert torch.equal(sample(sd15.pipe), sample(stock))
    assert fingerprint(stock.unet) == before, "it is read, and not changed"


def test_what_is_no_anchor_in_memory_is_refused(sd15):
    with pytest.raises(ValueError, match="is the pipeline's own network: give the aligned one"):
        realign(sd15.pipe, sd15.pipe, 0.5)
    with pytest.raises(ValueError, match=r"has adapters loaded: .* deradiff\.adapter_anchor"):
        realign(sd15.pipe, sd15.stock("lora1"), 0.5)
    with pytest.raises(ValueError, match="is a Linear and the sd15 pipeline's denoiser a UNet2D"):
        realign(sd15.pipe, nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="a pipeline or a network, and not float"):
        realign(sd15.pipe, 0.5, 0.5)
    with pytest.raises(ValueError, match="has no files that a bake could name: save it"):
        deradiff.bake(live_anchor(sd15.pipe), 0.5, "nowhere", base="nowhere")


def test_a_loaded_adapter_is_an_anchor(sd15):
    reference = sample(sd15.pipe)
    with realign(sd15.pipe, sd15.anchors["lora1"], lam=0.5):
        expected = sample(sd15.pipe)
    pipe = sd15.pipe
    pipe.load_lora_weights(sd15.anchors["lora1"], adapter_name="mine")
    try:
        aligned = sample(pipe)
        anchor = deradiff.adapter_anchor(pipe, "mine")
        with pytest.raises(ValueError, match=r"no adapter 'yours': it has mine"):
            deradiff.adapter_anchor(pipe, "yours")
        with pytest.raises(ValueError, match=r"active in .* pipe\.delete_adapters\('mine'\)"):
            realign(pipe, anchor, 0.5)
    finally:
        pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="no adapter 'mine': it has none"):
        deradiff.adapter_anchor(pipe, "mine")
    with realign(pipe, anchor, lam=0.5) as dial:
        assert torch.equal(sample(pipe), expected)
        dial.lam = 1
        assert torch.equal(sample(pipe), aligned)
        dial.lam = 0
        assert torch.equal(sample(pipe), reference)
