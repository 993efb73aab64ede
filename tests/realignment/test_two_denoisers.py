"""Pipelines with a network for early steps and another for late ones, as Wan 2.2."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from peft import LoraConfig

import deradiff
from deradiff.method.transitions import kl_factors
from deradiff.realignment.context import realign
from tests.support.realign_world import fingerprint
from tests.support.tiny_pipelines import perturbed_denoiser
from tests.support.toy_pipeline import BOUNDARY, TwoDenoisers, toy_inputs, two_calls

LAM = 0.6


@pytest.fixture
def pair(sd15, tmp_path):
    """The pipeline, both networks of its anchor, and the anchor's folder."""
    scheduler = EulerDiscreteScheduler.from_config(sd15.pipe.scheduler.config)
    early = sd15.pipe.unet
    late = perturbed_denoiser(early, seed=7)
    anchors = (perturbed_denoiser(early, seed=8), perturbed_denoiser(late, seed=9))
    for name, anchor in zip(("transformer", "transformer_2"), anchors):
        anchor.save_pretrained(tmp_path / name)
    return TwoDenoisers(early, late, scheduler), anchors, tmp_path


@torch.no_grad()
def by_hand(pipe, anchors, lam, steps=6):
    """The latents and the path KL of the mixed chain."""
    x, text, empty = toy_inputs(2)
    pipe.scheduler.set_timesteps(steps)
    factors = kl_factors(pipe.scheduler)
    x = x * pipe.scheduler.init_noise_sigma
    path_kl = torch.zeros(2, dtype=torch.float64)
    for index, t in enumerate(pipe.scheduler.timesteps):
        scaled = pipe.scheduler.scale_model_input(x, t)
        number = 0 if t >= BOUNDARY else 1
        own = (pipe.transformer, pipe.transformer_2)[number]
        reference = two_calls(own, scaled, t, text, empty)
        anchored = two_calls(anchors[number], scaled, t, text, empty)
        mixed = reference + lam * (anchored - reference)
        path_kl += factors[index] * (mixed - reference).double().square().sum((1, 2, 3))
        x = pipe.scheduler.step(mixed, t, x, return_dict=False)[0]
    return x, path_kl


def test_both_are_realigned_in_one_chain(pair):
    pipe, anchors, folder = pair
    before = [fingerprint(pipe.transformer), fingerprint(pipe.transformer_2)]
    reference = pipe()
    with realign(pipe, folder, LAM) as dial:
        for _ in range(2):
            x = pipe()
            path_kl = dial.path_kl
            assert dial.evaluations == 2
        dial.lam = 0
        assert torch.equal(pipe(), reference)
    expected, expected_kl = by_hand(pipe, anchors, LAM)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(path_kl.double(), expected_kl, rtol=1e-5, atol=1e-5)
    assert [fingerprint(pipe.transformer), fingerprint(pipe.transformer_2)] == before


@pytest.mark.parametrize("mode", ["reuse", "weights"])
def test_the_ends_are_those_of_both_in_every_mode(pair, mode):
    pipe, anchors, folder = pair
    with realign(pipe, folder, 1, mode=mode):
        x = pipe()
    expected, _ = by_hand(pipe, anchors, 1)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-3)


def test_an_anchor_of_one_part_is_refused_by_name(pair):
    pipe, _, folder = pair
    for file in (folder / "transformer_2").iterdir():
        file.unlink()
    (folder / "transformer_2").rmdir()
    with (
        pytest.raises(
            ValueError, match="has no transformer_2/, and the pipeline has that denoiser"
        ),
        realign(pipe, folder, 0.5),
    ):
        pass


def test_a_lora_file_for_one_of_two_is_refused_and_loaded_ones_for_both_are_dialled(pair, sd15):
    pipe, _, _ = pair
    with pytest.raises(ValueError, match=r"is for one denoiser, and .* under one adapter_name"):
        realign(pipe, sd15.anchors["lora1"], 0.5)

    reference = pipe()
    networks = (pipe.transformer, pipe.transformer_2)
    generator = torch.Generator().manual_seed(2)
    for network in networks:
        network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), "mine")
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)
    aligned = pipe()
    anchor = deradiff.adapter_anchor(pipe, "mine")
    for network in networks:
        network.delete_adapters("mine")
    with realign(pipe, anchor, 1) as dial:
        torch.testing.assert_close(pipe(), aligned, rtol=0, atol=1e-4)
        dial.lam = 0
        assert torch.equal(pipe(), reference)
    assert not torch.allclose(aligned, reference, atol=1e-2)
