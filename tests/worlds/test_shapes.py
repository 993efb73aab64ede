"""The shapes world: its captions, its two rewards and the labels made from them."""

import numpy as np
import pytest
import torch
from PIL import Image

from deradiff.data.tables import open_table
from deradiff.image_tables import image_of_cell
from deradiff.worlds import shapes


def test_captions_are_split_once_and_for_all():
    train = shapes.training_captions()
    held_out = shapes.held_out_captions()
    assert len(set(shapes.CAPTIONS)) == 300
    assert len(train) + len(held_out) == 300
    assert not set(train) & set(held_out)
    words = [*shapes.RADII, *shapes.HUES, *shapes.SHAPES, *shapes.BACKGROUNDS]
    for word in words:
        assert any(f" {word} " in f"{caption} " for caption in train), "training sees every word"


def test_a_text_that_is_no_caption_is_refused():
    with pytest.raises(ValueError, match="no caption of the shapes world"):
        shapes.scene_of("a red fox in the snow")


def circle(saturation, offset=0.0, width=1.0):
    """A red circle, drawn here and not by the world's renderer.

    Args:
        saturation: 0 to 1.
        offset: of the centre, in pixels.
        width: of the edge, in pixels.
    """
    y, x = np.mgrid[0:32, 0:32] - 15.5
    cover = np.clip(0.5 - (np.hypot(x - offset, y) - 10) / width, 0, 1)[..., None]
    colour = np.array([1, 1 - saturation, 1 - saturation])
    return Image.fromarray(((cover * colour + (1 - cover)) * 255).astype(np.uint8))


RED = "a large red circle on a white background"
GREEN = "a large green circle on a white background"


def test_vivid_prefers_saturated_colours_of_the_caption():
    pale, strong = shapes.vivid([circle(0.5), circle(1.0)], [RED, RED])
    assert strong > pale + 1
    assert shapes.vivid([circle(1.0)], [GREEN])[0] < pale


def test_crisp_prefers_sharp_edges_and_the_centre():
    soft, sharp = shapes.crisp([circle(1.0, width=4), circle(1.0, width=1)], [RED, RED])
    assert sharp > soft + 1
    aside, centred = shapes.crisp([circle(1.0, offset=4), circle(1.0)], [RED, RED])
    assert centred > aside + 1


def test_rewards_are_standardised_over_the_worlds_renders():
    rng = np.random.default_rng(5)
    scenes = [shapes.SCENES[i] for i in rng.integers(0, 300, 2000)]
    images = [Image.fromarray(image) for image in shapes.render(scenes, rng)]
    captions = [str(scene) for scene in scenes]
    for reward in (shapes.vivid, shapes.crisp):
        score = reward(images, captions)
        assert abs(score.mean()) < 0.1
        assert abs(score.std() - 1) < 0.1


@pytest.mark.parametrize("weights", [{"crisp": 1.0}, {"crisp": 0.25, "vivid": 0.75}])
def test_labels_are_bradley_terry_draws(tmp_path, weights):
    path = tmp_path / "p.parquet"
    shapes.write_pairs(path, 1500, seed=0, reward=weights)
    rows = open_table(str(path))
    captions = rows.column("caption")
    first = [image_of_cell(cell) for cell in rows.column("jpg_0")]
    second = [image_of_cell(cell) for cell in rows.column("jpg_1")]
    difference = torch.zeros(1500)
    for name, weight in weights.items():
        reward = getattr(shapes, name)
        difference += weight * (reward(first, captions) - reward(second, captions))
    first_is_preferred = np.array(rows.column("label_0")) == 1
    agreement = np.mean((difference.numpy() > 0) == first_is_preferred)
    # Not 1: the labels are noisy
    expected = torch.sigmoid(2 * difference.abs()).mean().item()
    assert agreement == pytest.approx(expected, abs=0.03)


def test_a_plain_reward_is_one_of_weight_1(tmp_path):
    shapes.write_pairs(tmp_path / "plain.parquet", 50, seed=0, reward="crisp")
    shapes.write_pairs(tmp_path / "weighted.parquet", 50, seed=0, reward={"crisp": 1.0})
    plain = open_table(str(tmp_path / "plain.parquet"))
    weighted = open_table(str(tmp_path / "weighted.parquet"))
    for column in ("jpg_0", "jpg_1", "label_0", "caption"):
        assert list(plain.column(column)) == list(weighted.column(column))
