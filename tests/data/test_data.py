"""Tables, pairs, the order of examples, the shapes world, and the cache."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from deradiff.data import synthetic_pairs
from deradiff.data.cache import Cache
from deradiff.data.pairs import CaptionedImages, Examples, Pairs, generator_of, pixels
from deradiff.data.tables import decode, open_table, write_pair_table, write_table
from deradiff.worlds import shapes
from tests.support.tiny_pipelines import tiny_pipeline


def png(value, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def pair_file(tmp_path):
    """Four rows: image 0 wins, image 1 wins, a tie, and image 0 wins."""
    path = tmp_path / "pairs.parquet"
    write_pair_table(
        path,
        [png(i) for i in range(4)],
        [png(100 + i) for i in range(4)],
        [1.0, 0.0, 0.5, 1.0],
        list("abca"),
    )
    return path


def test_pairs_put_the_winner_first_and_drop_ties(pair_file):
    pairs = Pairs(str(pair_file))
    assert (
        len(pairs) == 3
        and (pairs.ties, pairs.unlabelled) == (1, 0)
        and pairs.captions == ["a", "b", "a"]
    )
    assert [[np.asarray(p)[0, 0, 0] for p in pairs.pictures(i)] for i in range(3)] == [
        [0, 100],
        [101, 1],
        [3, 103],
    ]


def test_rows_without_a_label_are_dropped(tmp_path):
    path = tmp_path / "p.parquet"
    columns = {
        "jpg_0": [png(0)] * 2,
        "jpg_1": [png(1)] * 2,
        "label_0": [1.0, 1.0],
        "caption": ["a", "b"],
        "has_label": [True, False],
    }
    write_table(path, columns)
    pairs = Pairs(str(path))
    assert pairs.captions == ["a"] and (pairs.ties, pairs.unlabelled) == (0, 1)


def test_mistakes_in_tables_are_told(tmp_path, pair_file):
    with pytest.raises(ValueError, match=r"nowhere\.parquet does not exist"):
        Pairs(str(tmp_path / "nowhere.parquet"))
    with pytest.raises(ValueError, match="lacks the column image"):
        CaptionedImages(str(pair_file))
    write_pair_table(tmp_path / "ties.parquet", [png(0)], [png(1)], [0.5], ["a"])
    with pytest.raises(ValueError, match="no pair with a winner"):
        Pairs(str(tmp_path / "ties.parquet"))


def test_a_folder_of_captioned_images(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(50 * i))
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "caption": "dark"}\n{"file_name": "1.png", "caption": "light"}\n'
    )
    images = CaptionedImages(str(tmp_path))
    assert sorted(images.captions) == ["dark", "light"]
    assert np.asarray(images.pictures(images.captions.index("light"))[0]).max() == 50


def test_a_broken_picture_and_a_missing_caption(tmp_path):
    write_table(
        tmp_path / "t.parquet", {"image": [png(0), b"broken", png(2)], "caption": [None, "b", "c"]}
    )
    images = CaptionedImages(str(tmp_path / "t.parquet"))
    assert images.captions == ["b", "c"]
    with pytest.raises(ValueError, match=r"t\.parquet: image of row 1 is no picture"):
        images.pictures(0)


def test_decode_makes_rgb_of_what_is_not():
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (10, 20, 30, 128)).save(buffer, format="PNG")
    assert decode({"bytes": buffer.getvalue()}).mode == "RGB"
    with pytest.raises(OSError):
        decode(b"not an image")


def test_pixels_keep_the_centre_and_the_range():
    wide = Image.new("RGB", (16, 8), (255, 255, 255))
    wide.paste((0, 0, 0), (4, 0, 12, 8))
    assert pixels(wide, 8).shape == (3, 8, 8) and pixels(wide, 8).max() == -1


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own():
    examples = Examples(range(10), seed=3)
    places = [p for step in range(15) for p in examples.places(4 * step, 4 * step + 4)]
    assert (places == examples.span(0, 60).T).all(), "however it is cut"
    for epoch in range(6):
        assert Counter(i for e, i in places if e == epoch) == Counter(range(10))
    assert [i for e, i in places if e == 0] != [i for e, i in places if e == 1]


def test_random_choices_belong_to_the_example_and_its_epoch(pair_file):
    draw = lambda seed, epoch, index: torch.randn(
        4, generator=generator_of(seed, epoch, index)
    ).tolist()  # noqa: E731
    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert (
        len({tuple(draw(*k)) for k in [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 12, 0)]})
        == 5
    )
    item = Examples(Pairs(str(pair_file)), seed=0).item(epoch=1, index=2)
    assert (
        torch.randn(4, generator=item.generator).tolist() == draw(0, 1, 2) and item.caption == "a"
    )


def test_captions_of_the_shapes_world_are_split_once_and_for_all():
    train, held = shapes.training_captions(), shapes.held_out_captions()
    assert len(train) + len(held) == len(set(shapes.CAPTIONS)) == 300 and not set(train) & set(held)
    for words in (
        shapes.RADII,
        shapes.HUES,
        shapes.SHAPES,
        shapes.BACKGROUNDS,
    ):  # every word is seen in training
        assert all(any(f" {w} " in f"{c} " for c in train) for w in words)
    with pytest.raises(ValueError, match="no caption of the shapes world"):
        shapes.scene_of("a red fox in the snow")


def circle(saturation, offset=0.0, width=1.0):
    """A red circle drawn here, not by the world's renderer."""
    y, x = np.mgrid[0:32, 0:32] - 15.5
    cover = np.clip(0.5 - (np.hypot(x - offset, y) - 10) / width, 0, 1)[..., None]
    colour = np.array([1, 1 - saturation, 1 - saturation])
    return Image.fromarray(((cover * colour + (1 - cover)) * 255).astype(np.uint8))


def test_rewards_prefer_what_they_are_named_for():
    prompts = ["a large red circle on a white background"] * 2
    pale_strong = shapes.vivid([circle(0.5), circle(1.0)], prompts)
    assert pale_strong[1] > pale_strong[0] + 1
    assert (
        shapes.vivid([circle(1.0)], ["a large green circle on a white background"])[0]
        < pale_strong[0]
    )
    soft_sharp = shapes.crisp([circle(1.0, width=4), circle(1.0, width=1)], prompts)
    assert soft_sharp[1] > soft_sharp[0] + 1
    off_centred = shapes.crisp([circle(1.0, offset=4), circle(1.0)], prompts)
    assert off_centred[1] > off_centred[0] + 1


def test_rewards_are_standardised_over_the_worlds_renders():
    rng = np.random.default_rng(5)
    scenes = [shapes.SCENES[i] for i in rng.integers(0, 300, 2000)]
    images, prompts = (
        [Image.fromarray(p) for p in shapes.render(scenes, rng)],
        [str(s) for s in scenes],
    )
    for reward in (shapes.vivid, shapes.crisp):
        score = reward(images, prompts)
        assert abs(score.mean()) < 0.1 and abs(score.std() - 1) < 0.1


def test_labels_are_bradley_terry_draws(tmp_path):
    path = tmp_path / "p.parquet"
    shapes.write_pairs(path, 1500, seed=0, reward="crisp")
    rows = open_table(str(path))
    captions = rows.column("caption")
    sides = [[decode(b) for b in rows.column(c)] for c in ("jpg_0", "jpg_1")]
    difference = shapes.crisp(sides[0], captions) - shapes.crisp(sides[1], captions)
    agree = np.mean((difference.numpy() > 0) == (np.array(rows.column("label_0")) == 1))
    assert agree == pytest.approx(
        torch.sigmoid(2 * difference.abs()).mean().item(), abs=0.03
    )  # not 1: the labels are noisy


def test_a_scorer_labels_pairs_of_one_caption(tmp_path):
    images, out = tmp_path / "images.parquet", tmp_path / "pairs"
    write_table(
        images, {"image": [png(v) for v in (0, 200, 90, 91)], "caption": ["a", "a", "b", "b"]}
    )
    brightness = lambda pictures, prompts: torch.tensor(
        [float(np.asarray(p).mean()) for p in pictures]
    )  # noqa: E731
    brightness.name = "brightness"
    rows = CaptionedImages(str(images))
    synthetic_pairs.write_scored_pairs(
        out, rows, synthetic_pairs.drawn_pairs(rows, 20), lambda: brightness
    )
    pairs = Pairs(str(out))
    for i, caption in enumerate(pairs.captions):
        winner, loser = (int(np.asarray(p).mean()) for p in pairs.pictures(i))
        assert (winner, loser) == {"a": (200, 0), "b": (91, 90)}[caption]


def test_cache_holds_what_the_pipeline_encodes_and_goes_on_where_it_stopped(tmp_path, pair_file):
    from deradiff.data.cache import encode_images
    from deradiff.models.families import family_of

    pipe, pairs = tiny_pipeline("sdxl"), Pairs(str(pair_file))
    cache = Cache(tmp_path / "cache", "sdxl", pairs, resolution=64)
    cache.build(lambda: pipe)
    images = torch.stack([pixels(p, 64) for p in pairs.pictures(1)])
    torch.testing.assert_close(cache.latents(1), encode_images(pipe, images))
    texts, expected = cache.texts(["b", ""]), family_of(pipe).encode_prompts(pipe, ["b", ""])
    assert set(texts) == set(expected) == {"encoder_hidden_states", "text_embeds"}
    for key in texts:
        torch.testing.assert_close(texts[key], expected[key])
    missing = next(cache.folder.glob("texts-*"))
    times = {f: f.stat().st_mtime_ns for f in cache.folder.glob("latents-*")}
    missing.unlink()
    Cache(tmp_path / "cache", "sdxl", pairs, resolution=64).build(lambda: pipe)
    assert missing.is_file() and {f: f.stat().st_mtime_ns for f in times} == times


def test_a_cache_that_is_whole_loads_nothing(tmp_path, pair_file):
    pairs = Pairs(str(pair_file))
    Cache(tmp_path, "sd15", pairs, 64).build(lambda: tiny_pipeline("sd15"))
    Cache(tmp_path, "sd15", pairs, 64).build(lambda: pytest.fail("the encoders were loaded"))


def test_a_cache_of_other_encoders_rows_or_resolution_is_another_folder(tmp_path, pair_file):
    pairs, few = Pairs(str(pair_file)), Pairs(str(pair_file), limit=2)
    folders = {
        Cache(tmp_path, *told).folder
        for told in [("a", pairs, 64), ("b", pairs, 64), ("a", pairs, 32), ("a", few, 64)]
    }
    assert len(folders) == 4


def test_a_torn_shard_is_made_again(tmp_path, pair_file, caplog):
    cache = Cache(tmp_path, "sd15", Pairs(str(pair_file)), resolution=64)
    cache.build(lambda: tiny_pipeline("sd15"))
    shard = next(cache.folder.glob("latents-*"))
    whole = shard.read_bytes()
    for torn in (whole[: len(whole) // 2], b"", b"\0" * 100):
        shard.write_bytes(torn)
        Cache(tmp_path, "sd15", Pairs(str(pair_file)), resolution=64).build(
            lambda: tiny_pipeline("sd15")
        )
        assert shard.read_bytes() == whole
    assert caplog.text.count("is torn") == 3


def test_a_cache_holds_mirrored_pictures_where_they_are_asked_for(tmp_path, pair_file):
    from deradiff.data.cache import encode_images

    pipe, pairs = tiny_pipeline("sd15"), Pairs(str(pair_file))
    pairs.pictures = lambda i: [Image.linear_gradient("L").rotate(90).convert("RGB")] * 2
    cache = Cache(tmp_path, "sd15", pairs, resolution=64, flip=True)
    cache.build(lambda: pipe)
    mirrored = torch.stack([pixels(p, 64).flip(-1) for p in pairs.pictures(2)])
    torch.testing.assert_close(cache.latents(2, flip=True), encode_images(pipe, mirrored))
    assert not torch.allclose(cache.latents(2, flip=True), cache.latents(2), atol=1e-3)


def broken_table(path, count=8, broken=(2, 3)):
    """Pairs whose image 1 cannot be decoded in some rows; winner and caption tell the row."""
    bad = [b"broken" if i in broken else png(100 + i) for i in range(count)]
    write_pair_table(
        path, [png(i) for i in range(count)], bad, [1.0] * count, [str(i) for i in range(count)]
    )
    return str(path)


@pytest.mark.parametrize("cached", [False, True])
def test_a_broken_pair_is_skipped_named_and_replaced_by_the_next(tmp_path, caplog, cached):
    pairs = Pairs(broken_table(tmp_path / "p.parquet"), max_broken=0.3)
    if cached:
        for _ in range(2):  # the second time from the shards alone
            pairs = Pairs(pairs.source, max_broken=0.3)
            Cache(tmp_path, "sd15", pairs, 64).build(lambda: tiny_pipeline("sd15"))
    examples = Examples(pairs, seed=0)
    collate = lambda items: [
        (int(np.asarray(i.images[0])[0, 0, 0]), i.caption, i.index, i.place) for i in items
    ]  # noqa: E731
    batch = examples.batch(collate, [(0, 1), (0, 2), (5, 3), (0, 7)])
    assert [(value, caption) for value, caption, *_ in batch] == [
        (1, "1"),
        (4, "4"),
        (4, "4"),
        (7, "7"),
    ]
    assert [place for *_, place in batch] == [(0, 1), (0, 2), (5, 3), (0, 7)] and sorted(
        pairs.broken
    ) == [2, 3]
    assert "row 2" in caplog.text and "row 3" in caplog.text
    assert torch.equal(examples.item(0, 2).generator.get_state(), generator_of(0, 0, 2).get_state())


@pytest.mark.parametrize("cached", [False, True])
def test_too_many_broken_pairs_stop_the_run(tmp_path, cached):
    pairs = Pairs(broken_table(tmp_path / "p.parquet"), max_broken=0.2)
    with pytest.raises(
        ValueError, match=r"2 of 8 rows .* data\.max_broken=0\.2 allows; the last: .*row 3"
    ):
        if cached:
            Cache(tmp_path, "sd15", pairs, 64).build(lambda: tiny_pipeline("sd15"))
        else:
            Examples(pairs, seed=0).batch(
                lambda items: [i.images for i in items], [(0, i) for i in range(8)]
            )


@pytest.mark.parametrize("streaming", [False, True])
def test_winner_loser_caption_is_a_form_of_pairs_too(tmp_path, streaming):
    write_table(
        tmp_path / "w.parquet",
        {"winner": [png(1), png(2)], "loser": [png(3), png(4)], "caption": ["a", None]},
    )
    pairs = Pairs(str(tmp_path / "w.parquet"), streaming=streaming)
    assert (
        pairs.captions == ["a"]
        and [int(np.asarray(p)[0, 0, 0]) for p in pairs.pictures(0)] == [1, 3]
        and pairs.uncaptioned == 1
    )
    write_table(tmp_path / "x.parquet", {"winner": [png(1)], "caption": ["a"]})
    with pytest.raises(
        ValueError,
        match="lacks the column jpg_0, jpg_1, label_0, nor are there winner, loser, caption; it has",
    ):
        Pairs(str(tmp_path / "x.parquet"))
