"""The objectives that train a scorer: their loss, and the CLIP folder that they leave."""

import numpy as np
import pytest
import torch

from deradiff.training.objectives.clip import Contrastive, Preference
from deradiff.worlds import networks
from tests.support.objectives import items, small_clip


def log_softmax(logits, axis):
    return logits - np.log(np.exp(logits).sum(axis, keepdims=True))


def test_contrastive_counts_every_image_of_a_caption_as_its_positive(images):
    objective = Contrastive(*small_clip(images.captions))
    batch = objective.collate(items(images, 24))
    captions = sorted(set(images.captions[:24]))
    assert len(batch["input_ids"]) == len(captions)
    owner = batch["owner"].numpy()
    assert [captions[o] for o in owner] == images.captions[:24]

    loss, _ = objective.loss(objective.network, batch)
    inputs = {name: value for name, value in batch.items() if name != "owner"}
    logits = objective.network(**inputs).logits_per_image.detach().double().numpy()
    image_to_caption = -np.mean(log_softmax(logits, 1)[np.arange(24), owner])
    by_image = log_softmax(logits, 0)
    of_captions = [by_image[owner == c, c].mean() for c in range(len(captions))]
    caption_to_image = -np.mean(of_captions)
    assert loss.item() == pytest.approx((image_to_caption + caption_to_image) / 2, rel=1e-5)


def test_preference_raises_the_winner_of_its_own_prompt(pairs):
    objective = Preference(*small_clip(pairs.captions))
    batch = objective.collate(items(pairs))
    logits = objective.network(**batch).logits_per_image.detach()
    own = torch.stack([logits[[2 * i, 2 * i + 1], i] for i in range(4)])
    expected = -torch.log_softmax(own, 1)[:, 0].mean()
    loss, terms = objective.loss(objective.network, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms["accuracy"] == (own[:, 0] > own[:, 1]).float().mean()


def test_scorers_are_saved_as_clip_folders(tmp_path, pairs):
    objective = Preference(*small_clip(pairs.captions))
    objective.save(tmp_path)
    model, tokenizer, processor = networks.load_clip(str(tmp_path))
    batch = dict(tokenizer(pairs.captions[:1], padding="max_length", return_tensors="pt"))
    batch |= processor(pairs.images(0), return_tensors="pt")
    same = objective.network(**objective.collate(items(pairs, 1))).logits_per_image
    torch.testing.assert_close(model(**batch).logits_per_image, same)
