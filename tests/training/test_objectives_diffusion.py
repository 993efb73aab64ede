"""The objectives that train a denoiser: what they draw, what their loss is, what they save.

Shapes: B examples, P images of an example, latents (P, B, C, H, W).
"""

import math
from functools import partial

import diffusers
import numpy as np
import pytest
import torch

from deradiff.data.cache import Cache
from deradiff.models.families import FAMILIES, family_of
from deradiff.training.objectives.diffusion import DPO, Pretrain
from tests.support.objectives import disturb, dpo, items, make
from tests.support.products import sparse_product
from tests.support.tiny_pipelines import EVERY_KIND, tiny_lora, tiny_pipeline

FLOWS = ["sd3", "flux"]


def first_loss(objective, data):
    """The loss of the first examples, as a number."""
    loss, _ = objective.loss(objective.network, objective.collate(items(data)))
    return loss.item()


ROUNDING = 5e-5
"""By so much a loss at beta 500 is off, where single precision rounds the errors otherwise."""


@pytest.mark.parametrize(("family", "method"), sparse_product([*FAMILIES], ["lora", "full"]))
def test_dpo_starts_at_ln_two_and_its_reference_stays(family, method, pairs):
    _, objective = make(family, method)
    batch = objective.collate(items(pairs))
    loss, terms = objective.loss(objective.network, batch)
    # Where gradients are wanted, torch may take sums in another order than where they are not.
    assert loss.item() == pytest.approx(math.log(2), abs=ROUNDING)
    assert terms["margin"].abs().max() < 4 * ROUNDING

    # After a step the loss has moved, and the reference is still the stock network.
    disturb(objective, method)
    loss, terms = objective.loss(objective.network, batch)
    assert abs(loss.item() - math.log(2)) > 2 * ROUNDING
    assert (terms["model_mse"] != terms["reference_mse"]).all()
    assert loss.item() == pytest.approx(terms["loss"].mean().item())
    noisy = torch.randn(2, 4, *objective.latent_shape)
    _, conditioning = objective.encoded(batch)
    with objective.reference() as reference:
        of_reference = objective.predict(reference, noisy, batch["timesteps"], conditioning)
    stock = tiny_pipeline(family)
    network = getattr(stock, family_of(stock).denoiser)
    of_stock = objective.predict(network, noisy, batch["timesteps"], conditioning)
    torch.testing.assert_close(of_reference, of_stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", EVERY_KIND)
def test_loss_and_gradient_equal_an_evaluation_in_float64_of_their_own(family, pairs):
    """docs/method.md, *Beta has one convention*, in numpy, from the outputs of the networks alone.

    Noise, targets, errors and the loss are computed here again.
    """
    _, objective = make(family, "full")
    disturb(objective, "full")
    batch = objective.collate(items(pairs))
    outputs = {}

    def predict_and_keep(network, *arguments):
        output = DPO.predict(objective, network, *arguments).double()
        if output.requires_grad:
            output.retain_grad()
        name = "policy" if network is objective.network else "reference"
        outputs[name] = output
        return output

    objective.predict = predict_and_keep
    loss, terms = objective.loss(objective.network, batch)
    loss.backward()

    # The loss.
    clean = objective.encoded(batch)[0].double().numpy()
    noise = batch["noise"].double().numpy()
    target = noise[None] - clean if family in FLOWS else np.stack([noise, noise])
    policy = outputs["policy"].detach().numpy()
    error = ((policy - target) ** 2).mean((2, 3, 4))
    reference_error = ((outputs["reference"].detach().numpy() - target) ** 2).mean((2, 3, 4))
    worse = error - reference_error
    margin = -(objective.beta / 2) * (worse[0] - worse[1])
    assert loss.item() == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-4)
    for image, name in enumerate(("winner_vs_reference", "loser_vs_reference")):
        np.testing.assert_allclose(terms[name].numpy(), worse[image], rtol=1e-3, atol=1e-6)

    # Its gradient. slope: d loss / d error of the winner; of the loser, its negative.
    slope = objective.beta / 2 / (1 + np.exp(margin)) / len(margin)
    slopes = np.stack([slope, -slope])[..., None, None, None]
    expected = slopes * 2 * (policy - target) / np.prod(objective.latent_shape)
    gradient = outputs["policy"].grad.numpy()
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "PNDMScheduler"])
def test_training_noise_does_not_depend_on_the_sampler_that_the_base_ships_with(scheduler, pairs):
    losses = []
    for kind in ("DDIMScheduler", scheduler):  # SDXL's file names Euler, SD1.5's PNDM
        pipe = tiny_pipeline("sdxl")
        pipe.unet = tiny_lora(pipe.unet)
        pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
        losses.append(first_loss(dpo(pipe, "lora"), pairs))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_loss_is_the_same_with_and_without_the_cache(tmp_path, pairs):
    losses = []
    for cached in (False, True):
        pipe = tiny_pipeline("sdxl")
        pipe.unet = tiny_lora(pipe.unet)
        cache = None
        if cached:
            cache = Cache(tmp_path, "sdxl", pairs, 64)
            cache.build(partial(tiny_pipeline, "sdxl"))
        losses.append(first_loss(dpo(pipe, "lora", cache, dropout=0.5), pairs))
    # The encoders see other batches, and round otherwise.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_latents_lie_in_memory_as_those_of_a_cache(pairs):
    """Networks take other kernels for other layouts, and round otherwise."""
    _, objective = make("sd15", "lora")
    latents, _ = objective.encoded(objective.collate(items(pairs)))
    assert latents.is_contiguous()


def test_captions_are_dropped_for_both_images_at_the_stated_rate(pairs):
    objective = dpo(tiny_pipeline("sd15"), "full", dropout=0.5)
    captions = []
    for epoch in range(40):
        batch = objective.collate(items(pairs, 12, epoch))
        assert len(batch["captions"]) == 12
        captions += batch["captions"]
    assert captions.count("") / len(captions) == pytest.approx(0.5, abs=0.1)


def test_both_images_of_a_pair_share_flip_noise_and_time(pairs):
    _, plain = make("sd15", "lora")
    _, objective = make("sd15", "lora", flip=True)
    still = plain.collate(items(pairs, 12))
    batch = objective.collate(items(pairs, 12))
    flipped = 0
    for pair in range(12):
        before = still["images"][:, pair]
        after = batch["images"][:, pair]
        if not torch.equal(before, after):
            assert torch.equal(before.flip(-1), after), "both images are mirrored"
            flipped += 1
    assert 0 < flipped < 12
    assert torch.equal(still["noise"], batch["noise"])
    assert batch["noise"].shape == (12, 4, 8, 8), "one for both images"


def test_a_flow_is_pretrained_on_its_velocity(images):
    pipe = tiny_pipeline("sd3")
    objective = Pretrain(pipe, 64, None, caption_dropout=0.0)
    batch = objective.collate(items(images))
    loss, _ = objective.loss(objective.network, batch)

    clean = objective.encoded(batch)[0][0]
    noise = batch["noise"]
    time = batch["time"].reshape(-1, 1, 1, 1)
    conditioning = family_of(pipe).encode_prompts(pipe, batch["captions"])
    noisy = (1 - time) * clean + time * noise
    timesteps = 1000 * batch["time"]
    output = pipe.transformer(noisy, timestep=timesteps, **conditioning, return_dict=False)[0]
    expected = (output - (noise - clean)).square().mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_pretraining_is_the_denoising_error(images):
    pipe = tiny_pipeline("sd15")
    objective = Pretrain(pipe, 64, None, caption_dropout=0.0)
    batch = objective.collate(items(images))
    loss, _ = objective.loss(objective.network, batch)

    latents, conditioning = objective.encoded(batch)
    noisy = pipe.scheduler.add_noise(latents[0], batch["noise"], batch["timesteps"])
    embedded = conditioning["encoder_hidden_states"]
    output = pipe.unet(noisy, batch["timesteps"], encoder_hidden_states=embedded).sample
    expected = (output - batch["noise"]).square().mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
