"""Pairs from prompts, a pipeline and a scorer: sampled, labelled, stored in parts, resumed."""

import numpy as np
import pytest
import torch
from PIL import Image

from deradiff.data import synthetic_pairs
from deradiff.data.pairs import CaptionedImages, Pairs
from deradiff.data.synthetic_pairs import (
    bradley_terry,
    consecutive_pairs,
    write_sampled_images,
    write_scored_pairs,
)
from deradiff.data.tables import open_table
from tests.support.tiny_pipelines import tiny_pipeline

PROMPTS = ["a red fox", "a blue cat", "nothing"]
CALL = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 32, "width": 32}


def brightness(pictures, prompts):
    return torch.tensor([float(np.asarray(p).mean()) for p in pictures])


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(synthetic_pairs, "PART", 2)


def test_two_pictures_of_each_prompt_depend_on_neither_batches_nor_interruptions(tmp_path):
    pipe, loads = tiny_pipeline("sdxl"), []
    load = lambda: (loads.append(1), pipe)[1]  # noqa: E731
    write_sampled_images(tmp_path / "a", load, PROMPTS, 5, batch_size=3, **CALL)
    write_sampled_images(tmp_path / "b", load, PROMPTS, 5, batch_size=1, **CALL)
    rows = [CaptionedImages(str(tmp_path / name), streaming=True) for name in "ab"]
    assert (
        rows[0].captions == [p for i in range(5) for p in [PROMPTS[i % 3]] * 2] == rows[1].captions
    )
    pictures = [
        np.stack([np.asarray(r.pictures(i)[0], dtype=int) for i in range(10)]) for r in rows
    ]
    assert abs(pictures[0] - pictures[1]).max() <= 2, "rounding of another batch"
    assert all((pictures[0][i] != pictures[0][j]).any() for i in range(10) for j in range(i)), (
        "all differ, of one prompt too"
    )
    part = tmp_path / "a" / "part-000001.parquet"
    before = part.read_bytes()
    part.unlink()
    write_sampled_images(tmp_path / "a", load, PROMPTS, 5, batch_size=3, **CALL)
    assert part.read_bytes() == before and len(loads) == 3
    write_sampled_images(tmp_path / "a", load, PROMPTS, 5, batch_size=3, **CALL)
    assert len(loads) == 3, "nothing is missing, so nothing is loaded"


@pytest.fixture
def images(tmp_path):
    from tests.data.test_data import png, write_table

    write_table(
        tmp_path / "images.parquet",
        {"image": [png(v) for v in (9, 200, 70, 70, 130, 120)], "caption": list("aabbcc")},
    )
    return CaptionedImages(str(tmp_path / "images.parquet"))


def test_a_higher_score_wins_and_equal_ones_are_ties(tmp_path, images):
    write_scored_pairs(tmp_path / "pairs", images, consecutive_pairs(images), lambda: brightness)
    table, pairs = open_table(str(tmp_path / "pairs")), Pairs(str(tmp_path / "pairs"))
    assert (
        table.column("label_0") == [0.0, 0.5, 1.0]
        and table.column("label_1") == [1.0, 0.5, 0.0]
        and pairs.ties == 1
    )
    assert table.column("score_0") == [9.0, 70.0, 130.0] and table.column("score_1") == [
        200.0,
        70.0,
        120.0,
    ]
    assert [[int(np.asarray(p).mean()) for p in pairs.pictures(i)] for i in range(2)] == [
        [200, 9],
        [130, 120],
    ]


def test_a_scorer_is_loaded_once_and_only_for_what_is_missing(tmp_path, images):
    loads = []
    load = lambda: (loads.append(1), brightness)[1]  # noqa: E731
    for _ in range(2):
        write_scored_pairs(tmp_path / "pairs", images, consecutive_pairs(images), load)
    assert len(loads) == 1


def test_labels_at_a_temperature_are_bradley_terry_draws():
    difference = torch.linspace(-2, 2, 5).repeat_interleave(4000)
    labels = bradley_terry(difference, 0.5, 0, range(len(difference)))
    assert set(labels.tolist()) == {0.0, 1.0}
    for value, group in zip(torch.linspace(-2, 2, 5), labels.reshape(5, -1)):
        assert group.mean().item() == pytest.approx(torch.sigmoid(value / 0.5).item(), abs=0.03)
    assert torch.equal(labels[8:16], bradley_terry(difference[8:16], 0.5, 0, range(8, 16))), (
        "a row's draw is its own"
    )
    assert not torch.equal(labels, bradley_terry(difference, 0.5, 1, range(len(difference))))


def test_a_negative_temperature_is_refused(tmp_path, images):
    with pytest.raises(
        ValueError, match="temperature must be 0, for hard labels, or above, not -1"
    ):
        write_scored_pairs(
            tmp_path / "pairs",
            images,
            consecutive_pairs(images),
            lambda: brightness,
            temperature=-1,
        )


def test_any_pipeline_of_diffusers_samples(tmp_path):
    class Pipeline:
        def __call__(self, prompt, generator, **call):
            values = [int(torch.randint(256, (1,), generator=g)) for g in generator]
            return type(
                "Output",
                (),
                {"images": [Image.new("RGB", (call["width"], 8), (v, v, v)) for v in values]},
            )

    write_sampled_images(tmp_path / "a", Pipeline, PROMPTS, 3, width=16)
    assert len(consecutive_pairs(CaptionedImages(str(tmp_path / "a")))) == 3
