"""Each objective on its own: what it draws, what its loss is, what it saves."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from deradiff.data.cache import Cache
from deradiff.data.pairs import CaptionedImages, Pairs
from deradiff.models.families import family_of
from deradiff.training.objectives.autoencoder import POSTERIOR_STD, Autoencoder
from deradiff.training.objectives.clip import Contrastive, Preference
from deradiff.training.objectives.diffusion import DPO, Pretrain
from deradiff.worlds import networks, shapes
from tests.support.objectives import disturb, dpo, items, make
from tests.support.tiny_pipelines import tiny_lora, tiny_pipeline


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.parquet"
    shapes.write_pairs(path, 12, seed=0)
    return Pairs(str(path))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.parquet"
    shapes.write_images(path, 24, seed=0)
    return CaptionedImages(str(path))


FAMILIES = ["sd15", "sdxl", "sd3", "flux"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_dpo_starts_at_ln_two_and_its_reference_stays(family, method, pairs):
    stock = tiny_pipeline(family)
    _, objective = make(family, method)
    batch = objective.collate(items(pairs))
    loss, terms = objective.loss(objective.network, batch)
    assert loss.item() == pytest.approx(math.log(2)) and torch.equal(
        terms["implicit_accuracy"], torch.full((4,), 0.5)
    )
    disturb(objective, method)
    loss, terms = objective.loss(objective.network, batch)
    assert (
        abs(loss.item() - math.log(2)) > 1e-4
        and (terms["model_mse"] != terms["reference_mse"]).all()
    )
    assert loss.item() == pytest.approx(terms["loss"].mean().item())
    noisy, texts = torch.randn(2, 4, *objective.latent_shape), objective.encoded(batch)[1]
    with objective.reference() as reference:
        out = objective.predict(reference, noisy, batch["timesteps"], texts)
    assert torch.equal(
        out,
        objective.predict(
            getattr(stock, family_of(stock).denoiser), noisy, batch["timesteps"], texts
        ),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_equal_an_evaluation_in_float64_of_their_own(family, pairs):
    """method.md section 7, read off the networks' outputs: noise, targets, errors and the loss are made here again, in numpy."""
    _, objective = make(family, "full")
    disturb(objective, "full")
    batch = objective.collate(items(pairs))
    outputs = {}

    def keep(network, *arguments):
        outputs[network is objective.network] = made = DPO.predict(
            objective, network, *arguments
        ).double()
        if made.requires_grad:
            made.retain_grad()
        return made

    objective.predict = keep
    loss, terms = objective.loss(objective.network, batch)
    loss.backward()
    clean, noise, t = (
        objective.encoded(batch)[0].double().numpy(),
        batch["noise"].double().numpy(),
        batch["timesteps"].double().numpy(),
    )
    target = noise[None] - clean if family in ("sd3", "flux") else np.stack([noise, noise])
    policy, frozen = (outputs[side].detach().numpy() for side in (True, False))
    error, reference = (((out - target) ** 2).mean((2, 3, 4)) for out in (policy, frozen))
    margin = -(objective.beta / 2) * ((error[0] - reference[0]) - (error[1] - reference[1]))
    assert loss.item() == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-4)
    for side, name in enumerate(("winner_vs_reference", "loser_vs_reference")):
        np.testing.assert_allclose(
            terms[name].numpy(), (error - reference)[side], rtol=1e-3, atol=1e-6
        )
    slope = (
        objective.beta / 2 / (1 + np.exp(margin)) / len(t)
    )  # d loss / d error of the winner; of the loser, its negative
    expected = (
        np.stack([slope, -slope])[..., None, None, None]
        * 2
        * (policy - target)
        / np.prod(objective.latent_shape)
    )
    np.testing.assert_allclose(
        outputs[True].grad.numpy(), expected, rtol=1e-3, atol=1e-5 * abs(expected).max()
    )


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "PNDMScheduler"])
def test_training_noise_does_not_depend_on_the_sampler_that_the_base_ships_with(scheduler, pairs):
    import diffusers

    losses = []
    for kind in ("DDIMScheduler", scheduler):  # SDXL's file names Euler, SD1.5's PNDM
        pipe = tiny_pipeline("sdxl")
        pipe.unet = tiny_lora(pipe.unet)
        pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
        objective = dpo(pipe, "lora")
        losses.append(objective.loss(objective.network, objective.collate(items(pairs)))[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_loss_is_the_same_with_and_without_the_cache(tmp_path, pairs):
    losses = []
    for cached in (False, True):
        pipe = tiny_pipeline("sdxl")
        pipe.unet = tiny_lora(pipe.unet)
        cache = Cache(tmp_path, "sdxl", pairs, 64) if cached else None
        if cache:
            cache.build(partial(tiny_pipeline, "sdxl"))
        objective = dpo(pipe, "lora", cache, dropout=0.5)
        losses.append(objective.loss(objective.network, objective.collate(items(pairs)))[0].item())
    # An error of about 2 is rounded to 2**-23 of itself, and beta / 2 scales the difference of four.
    rounding = 500 / 2 * 4 * 2 * 2**-23
    assert losses[0] == pytest.approx(losses[1], abs=rounding)


def test_captions_are_dropped_for_both_pictures_at_the_stated_rate(pairs):
    objective = dpo(tiny_pipeline("sd15"), "full", dropout=0.5)
    drawn = [objective.collate(items(pairs, 12, epoch))["captions"] for epoch in range(40)]
    share = np.mean([caption == "" for batch in drawn for caption in batch])
    assert share == pytest.approx(0.5, abs=0.1) and all(len(batch) == 12 for batch in drawn)


def test_both_pictures_of_a_pair_share_flip_noise_and_time(pairs):
    _, plain = make("sd15", "lora")
    _, objective = make("sd15", "lora", flip=True)
    still, batch = plain.collate(items(pairs, 12)), objective.collate(items(pairs, 12))
    turned = [
        [not torch.equal(a, b) for a, b in zip(*sides)]
        for sides in zip(still["images"].transpose(0, 1), batch["images"].transpose(0, 1))
    ]
    assert all(a == b for a, b in turned) and 0 < sum(a for a, _ in turned) < 12
    for (flipped, _), before, after in zip(
        turned, still["images"].transpose(0, 1), batch["images"].transpose(0, 1)
    ):
        assert torch.equal(before.flip(-1) if flipped else before, after)
    assert torch.equal(still["noise"], batch["noise"]) and batch["noise"].shape == (12, 4, 8, 8), (
        "one for both"
    )


def test_a_flow_is_pretrained_on_its_velocity(images):
    pipe = tiny_pipeline("sd3")
    objective = Pretrain(pipe, 64, None, caption_dropout=0.0)
    batch = objective.collate(items(images))
    loss, _ = objective.loss(objective.network, batch)
    latents, t = objective.encoded(batch)[0][0], batch["time"].reshape(-1, 1, 1, 1)
    texts = family_of(pipe).encode_prompts(pipe, batch["captions"])
    out = pipe.transformer(
        (1 - t) * latents + t * batch["noise"],
        timestep=1000 * batch["time"],
        **texts,
        return_dict=False,
    )[0]
    assert loss.item() == pytest.approx(
        (out - (batch["noise"] - latents)).square().mean().item(), rel=1e-5
    )


def test_pretraining_is_the_denoising_error(images):
    pipe = tiny_pipeline("sd15")
    objective = Pretrain(pipe, 64, None, caption_dropout=0.0)
    batch = objective.collate(items(images))
    loss, _ = objective.loss(objective.network, batch)
    latents, texts = objective.encoded(batch)
    noisy = pipe.scheduler.add_noise(latents[0], batch["noise"], batch["timesteps"])
    out = pipe.unet(
        noisy, batch["timesteps"], encoder_hidden_states=texts["encoder_hidden_states"]
    ).sample
    assert loss.item() == pytest.approx((out - batch["noise"]).square().mean().item(), rel=1e-5)


def clip_parts(captions):
    tokenizer = networks.make_tokenizer(captions)
    torch.manual_seed(0)
    return networks.make_clip(tokenizer, 32, width=32), tokenizer, networks.make_image_processor(32)


def test_contrastive_counts_every_picture_of_a_caption_as_its_positive(images):
    objective = Contrastive(*clip_parts(images.captions))
    batch = objective.collate(items(images, 24))
    captions = sorted(set(images.captions[:24]))
    assert (
        len(batch["input_ids"]) == len(captions)
        and [captions[o] for o in batch["owner"]] == images.captions[:24]
    )
    loss, _ = objective.loss(objective.network, batch)
    logits = (
        objective.network(**{k: v for k, v in batch.items() if k != "owner"})
        .logits_per_image.detach()
        .double()
        .numpy()
    )
    rows = np.arange(len(logits))
    to_text = -np.mean(
        (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[rows, batch["owner"]]
    )
    by_image = logits - np.log(np.exp(logits).sum(0, keepdims=True))
    owned = [[i for i in rows if batch["owner"][i] == c] for c in range(len(captions))]
    to_image = -np.mean([np.mean([by_image[i, c] for i in own]) for c, own in enumerate(owned)])
    assert loss.item() == pytest.approx((to_text + to_image) / 2, rel=1e-5)


def test_preference_raises_the_winner_of_its_own_prompt(pairs):
    objective = Preference(*clip_parts(pairs.captions))
    batch = objective.collate(items(pairs))
    logits = objective.network(**batch).logits_per_image.detach()
    own = torch.stack([logits[[2 * i, 2 * i + 1], i] for i in range(4)])
    expected = -torch.log_softmax(own, 1)[:, 0].mean()
    loss, terms = objective.loss(objective.network, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms["accuracy"] == (own[:, 0] > own[:, 1]).float().mean()


def test_scorers_are_saved_as_clip_folders(tmp_path, pairs):
    objective = Preference(*clip_parts(pairs.captions))
    objective.save(tmp_path)
    model, tokenizer, processor = networks.load_clip(str(tmp_path))
    batch = dict(tokenizer(pairs.captions[:1], padding="max_length", return_tensors="pt"))
    batch |= processor(pairs.pictures(0), return_tensors="pt")
    same = objective.network(**objective.collate(items(pairs, 1))).logits_per_image
    torch.testing.assert_close(model(**batch).logits_per_image, same)


def test_words_are_one_token_each_and_anything_else_still_has_tokens():
    tokenizer = networks.make_tokenizer(shapes.CAPTIONS)
    assert len(tokenizer.tokenize(shapes.CAPTIONS[7])) == len(shapes.CAPTIONS[7].split())
    assert tokenizer.unk_token_id not in tokenizer("Ünïcode 狐狸!")["input_ids"][1:-1]


def test_the_saved_autoencoder_has_white_latents_and_the_same_pictures(tmp_path, images):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = networks.make_vae()
    objective = Autoencoder(vae, 32, images)
    batch = objective.collate(items(images, 24))
    _, terms = objective.loss(objective.network, batch)
    assert terms["psnr"].item() == pytest.approx(
        -10 * math.log10((objective.network(**batch) - batch["images"]).square().mean().item() / 4),
        rel=1e-4,
    )
    before = vae.decode(vae.encode(batch["images"]).latent_dist.mean).sample.detach()
    objective.save(tmp_path)
    saved = AutoencoderKL.from_pretrained(tmp_path)
    posterior = saved.encode(batch["images"]).latent_dist
    torch.testing.assert_close(
        saved.decode(posterior.mean).sample.detach(), before, atol=2e-4, rtol=1e-3
    )
    rows = posterior.mean.detach().transpose(0, 1).flatten(1)
    assert rows.mean(1).abs().max() < 0.01 and (torch.cov(rows) - torch.eye(4)).abs().max() < 0.02
    assert saved.config.scaling_factor == 1 and posterior.std.detach().flatten()[
        0
    ].item() == pytest.approx(POSTERIOR_STD, rel=1e-3)


def test_a_new_pipeline_is_a_stock_one(tmp_path):
    clip, tokenizer, _ = clip_parts(shapes.CAPTIONS)
    pipe = networks.make_pipeline(
        networks.text_tower(clip), tokenizer, networks.make_vae(), 32, channels=(16, 32)
    )
    tokens = tokenizer(shapes.CAPTIONS[:2], padding="max_length", return_tensors="pt")
    torch.testing.assert_close(pipe.text_encoder(**tokens)[0], clip.text_model(**tokens)[0])
    pipe.save_pretrained(tmp_path)
    from diffusers import DiffusionPipeline

    picture = DiffusionPipeline.from_pretrained(tmp_path)(
        shapes.CAPTIONS[0], num_inference_steps=2, height=32, width=32
    ).images[0]
    assert isinstance(picture, Image.Image) and picture.size == (32, 32)
