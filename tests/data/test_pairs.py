"""Captioned images and pairs, broken images, and the order and random choices of examples."""

from collections import Counter

import pytest
import torch
from PIL import Image

from deradiff.data.cache import Cache
from deradiff.data.pairs import CaptionedImages, Examples, Pairs, generator_of, image_tensor
from deradiff.image_tables import write_pair_table, write_table
from tests.support.tables import grey_value, png, write_broken_pairs
from tests.support.tiny_pipelines import tiny_pipeline

# Rows


def test_pairs_put_the_winner_first_and_drop_ties(pair_file):
    pairs = Pairs(str(pair_file))
    assert len(pairs) == 3
    assert (pairs.ties, pairs.missing_labels) == (1, 0)
    assert pairs.captions == ["a", "b", "a"]
    values = []
    for index in range(3):
        winner, loser = pairs.images(index)
        values.append((grey_value(winner), grey_value(loser)))
    assert values == [(0, 100), (101, 1), (3, 103)]


def test_rows_without_a_label_are_dropped(tmp_path):
    path = tmp_path / "pairs.parquet"
    columns = {
        "jpg_0": [png(0)] * 2,
        "jpg_1": [png(1)] * 2,
        "label_0": [1.0, 1.0],
        "caption": ["a", "b"],
        "has_label": [True, False],
    }
    write_table(path, columns)
    pairs = Pairs(str(path))
    assert pairs.captions == ["a"]
    assert (pairs.ties, pairs.missing_labels) == (0, 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_winner_loser_caption_is_a_form_of_pairs_too(tmp_path, streaming):
    path = tmp_path / "pairs.parquet"
    columns = {
        "winner": [png(1), png(2)],
        "loser": [png(3), png(4)],
        "caption": ["a", None],
    }
    write_table(path, columns)
    pairs = Pairs(str(path), streaming=streaming)
    assert pairs.captions == ["a"]
    assert pairs.missing_captions == 1
    assert [grey_value(image) for image in pairs.images(0)] == [1, 3]


def test_a_table_with_neither_form_of_pairs_is_refused_by_its_columns(tmp_path):
    path = tmp_path / "pairs.parquet"
    write_table(path, {"winner": [png(1)], "caption": ["a"]})
    missing = "jpg_0, jpg_1, label_0, nor are there winner, loser, caption"
    with pytest.raises(ValueError, match=f"lacks the column {missing}; it has"):
        Pairs(str(path))


def test_a_missing_column_and_a_missing_winner_are_refused(tmp_path, pair_file):
    with pytest.raises(ValueError, match="lacks the column image"):
        CaptionedImages(str(pair_file))
    path = tmp_path / "ties.parquet"
    write_pair_table(path, [png(0)], [png(1)], [0.5], ["a"])
    with pytest.raises(ValueError, match="no pair with a winner"):
        Pairs(str(path))


def test_a_broken_image_and_a_missing_caption(tmp_path):
    path = tmp_path / "t.parquet"
    write_table(path, {"image": [png(0), b"broken", png(2)], "caption": [None, "b", "c"]})
    images = CaptionedImages(str(path))
    assert images.captions == ["b", "c"]
    with pytest.raises(ValueError, match=r"t\.parquet: image of row 1 is not an image"):
        images.images(0)


def test_tensors_of_images_keep_the_centre_and_the_range():
    wide = Image.new("RGB", (16, 8), (255, 255, 255))
    wide.paste((0, 0, 0), (4, 0, 12, 8))
    tensor = image_tensor(wide, 8)
    assert tensor.shape == (3, 8, 8)
    assert tensor.max() == -1


# Order and random choices


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own():
    examples = Examples(range(10), seed=3)
    order = []
    for step in range(15):
        order += examples.epoch_indices(4 * step, 4 * step + 4)
    assert (order == examples.span(0, 60).T).all(), "however it is cut"

    def indices(epoch):
        return [one.example for one in order if one.epoch == epoch]

    for epoch in range(6):
        assert Counter(indices(epoch)) == Counter(range(10))
    assert indices(0) != indices(1)


def test_random_choices_belong_to_the_example_and_its_epoch(pair_file):
    def draw(seed, epoch, index):
        return torch.randn(4, generator=generator_of(seed, epoch, index)).tolist()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    places = [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 12, 0)]
    assert len({tuple(draw(*place)) for place in places}) == 5

    item = Examples(Pairs(str(pair_file)), seed=0).item(epoch=1, index=2)
    assert torch.randn(4, generator=item.generator).tolist() == draw(0, 1, 2)
    assert item.caption == "a"


# Broken images during training


def winners(items):
    """A batch: the value of each winner, its caption, and where it stands in the run."""
    return [(grey_value(item.images[0]), item.caption, item.epoch_index) for item in items]


@pytest.mark.parametrize("cached", [False, True])
def test_a_broken_pair_is_skipped_named_and_replaced_by_the_next(tmp_path, caplog, cached):
    path = write_broken_pairs(tmp_path / "p.parquet")
    pairs = Pairs(path, max_broken=0.3)
    if cached:
        # The second time from the shards alone
        for _ in range(2):
            pairs = Pairs(path, max_broken=0.3)
            Cache(tmp_path, "sd15", pairs, 64).build(lambda: tiny_pipeline("sd15"))

    examples = Examples(pairs, seed=0)
    places = [(0, 1), (0, 2), (5, 3), (0, 7)]
    batch = examples.batch(winners, places)
    assert [value for value, _, _ in batch] == [1, 4, 4, 7]
    assert [caption for _, caption, _ in batch] == ["1", "4", "4", "7"]
    assert [place for _, _, place in batch] == places
    assert sorted(pairs.broken) == [2, 3]
    assert "row 2" in caplog.text
    assert "row 3" in caplog.text

    # The replacement draws what the broken pair would have drawn
    generator = examples.item(0, 2).generator
    assert torch.equal(generator.get_state(), generator_of(0, 0, 2).get_state())


@pytest.mark.parametrize("cached", [False, True])
def test_too_many_broken_pairs_stop_the_run(tmp_path, cached):
    pairs = Pairs(write_broken_pairs(tmp_path / "p.parquet"), max_broken=0.2)
    message = r"2 of 8 rows .* max_broken=0\.2 allows; the last: .*row 3"
    with pytest.raises(ValueError, match=message):
        if cached:
            Cache(tmp_path, "sd15", pairs, 64).build(lambda: tiny_pipeline("sd15"))
        else:
            Examples(pairs, seed=0).batch(winners, [(0, index) for index in range(8)])
