"""Pairs from prompts, a pipeline and a scorer: sampled, labelled, stored in parts, resumed."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from deradiff.data import synthetic_pairs
from deradiff.data.pairs import CaptionedImages, Pairs
from deradiff.data.synthetic_pairs import (
    bradley_terry,
    consecutive_pairs,
    random_pairs,
    write_sampled_images,
    write_scored_pairs,
)
from deradiff.data.tables import open_table
from deradiff.image_tables import write_table
from tests.support.tables import grey_value, png
from tests.support.tiny_pipelines import tiny_pipeline

PROMPTS = ["a red fox", "a blue cat", "nothing"]
CALL = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 32, "width": 32}


def brightness(images, captions):
    """A scorer."""
    return torch.tensor([float(np.asarray(image).mean()) for image in images])


class CountedLoad:
    """A function that gives `value`, and counts its calls."""

    def __init__(self, value):
        self.value = value
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.value


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(synthetic_pairs, "PART", 2)


def test_two_images_of_each_prompt_depend_on_neither_batches_nor_interruptions(tmp_path):
    load = CountedLoad(tiny_pipeline("sdxl"))
    write_sampled_images(tmp_path / "a", load, PROMPTS, 5, batch_size=3, **CALL)
    write_sampled_images(tmp_path / "b", load, PROMPTS, 5, batch_size=1, **CALL)
    by_threes = CaptionedImages(str(tmp_path / "a"), streaming=True)
    one_by_one = CaptionedImages(str(tmp_path / "b"), streaming=True)
    captions = []
    for pair in range(5):
        captions += [PROMPTS[pair % 3]] * 2
    assert by_threes.captions == one_by_one.captions == captions

    # Equal up to the rounding of another batch; all are different, also two of one prompt
    images = [np.asarray(by_threes.images(row)[0], dtype=int) for row in range(10)]
    others = [np.asarray(one_by_one.images(row)[0], dtype=int) for row in range(10)]
    assert abs(np.stack(images) - np.stack(others)).max() <= 2
    for first, second in itertools.combinations(images, 2):
        assert (first != second).any()

    # A missing part is written again, and nothing else
    part = tmp_path / "a" / "part-000001.parquet"
    before = part.read_bytes()
    part.unlink()
    write_sampled_images(tmp_path / "a", load, PROMPTS, 5, batch_size=3, **CALL)
    assert part.read_bytes() == before
    assert load.calls == 3
    write_sampled_images(tmp_path / "a", load, PROMPTS, 5, batch_size=3, **CALL)
    assert load.calls == 3, "nothing is missing, so nothing is loaded"


def test_any_pipeline_of_diffusers_samples(tmp_path):
    class Pipeline:
        def __call__(self, prompt, generator, **call):
            images = []
            for one in generator:
                value = int(torch.randint(256, (1,), generator=one))
                images.append(Image.new("RGB", (call["width"], 8), (value, value, value)))
            return SimpleNamespace(images=images)

    write_sampled_images(tmp_path / "a", Pipeline, PROMPTS, 3, width=16)
    assert len(consecutive_pairs(CaptionedImages(str(tmp_path / "a")))) == 3


@pytest.fixture
def images(tmp_path):
    """Two images for each of three captions."""
    path = tmp_path / "images.parquet"
    values = (9, 200, 70, 70, 130, 120)
    write_table(path, {"image": [png(value) for value in values], "caption": list("aabbcc")})
    return CaptionedImages(str(path))


def test_a_higher_score_wins_and_equal_ones_are_ties(tmp_path, images):
    folder = str(tmp_path / "pairs")
    write_scored_pairs(tmp_path / "pairs", images, consecutive_pairs(images), lambda: brightness)
    table = open_table(folder)
    assert table.column("label_0") == [0.0, 0.5, 1.0]
    assert table.column("label_1") == [1.0, 0.5, 0.0]
    assert table.column("score_0") == [9.0, 70.0, 130.0]
    assert table.column("score_1") == [200.0, 70.0, 120.0]
    pairs = Pairs(folder)
    assert pairs.ties == 1
    assert [grey_value(image) for image in pairs.images(0)] == [200, 9]
    assert [grey_value(image) for image in pairs.images(1)] == [130, 120]


def test_random_pairs_share_a_caption(tmp_path):
    path = tmp_path / "images.parquet"
    values = (0, 200, 90, 91)
    write_table(path, {"image": [png(value) for value in values], "caption": list("aabb")})
    images = CaptionedImages(str(path))
    write_scored_pairs(tmp_path / "pairs", images, random_pairs(images, 20), lambda: brightness)
    pairs = Pairs(str(tmp_path / "pairs"))
    expected = {"a": [200, 0], "b": [91, 90]}
    for index, caption in enumerate(pairs.captions):
        assert [grey_value(image) for image in pairs.images(index)] == expected[caption]


def test_a_scorer_is_loaded_once_and_only_for_what_is_missing(tmp_path, images):
    load = CountedLoad(brightness)
    for _ in range(2):
        write_scored_pairs(tmp_path / "pairs", images, consecutive_pairs(images), load)
    assert load.calls == 1


def test_labels_at_a_temperature_are_bradley_terry_draws():
    values = torch.linspace(-2, 2, 5)
    difference = values.repeat_interleave(4000)
    labels = bradley_terry(difference, 0.5, 0, range(len(difference)))
    assert set(labels.tolist()) == {0.0, 1.0}
    for value, group in zip(values, labels.reshape(5, -1)):
        expected = torch.sigmoid(value / 0.5).item()
        assert group.mean().item() == pytest.approx(expected, abs=0.03)

    some = bradley_terry(difference[8:16], 0.5, 0, range(8, 16))
    assert torch.equal(labels[8:16], some), "a label depends on the seed and its number alone"
    assert not torch.equal(labels, bradley_terry(difference, 0.5, 1, range(len(difference))))


def test_a_negative_temperature_is_refused(tmp_path, images):
    pairs = consecutive_pairs(images)
    message = "temperature must be 0, for hard labels, or above, not -1"
    with pytest.raises(ValueError, match=message):
        write_scored_pairs(tmp_path / "pairs", images, pairs, lambda: brightness, temperature=-1)
