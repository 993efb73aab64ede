"""Encodings: equal to what the pipeline encodes, complete, and made once."""

import pytest
import torch
from PIL import Image

from deradiff.data.cache import Cache, encode_images
from deradiff.data.pairs import Pairs, image_tensor
from deradiff.models.families import family_of
from tests.support.tiny_pipelines import tiny_pipeline


def test_a_cache_holds_what_the_pipeline_encodes_and_continues_where_it_stopped(
    tmp_path, pair_file
):
    pipe = tiny_pipeline("sdxl")
    pairs = Pairs(str(pair_file))
    cache = Cache(tmp_path / "cache", "sdxl", pairs, resolution=64)
    cache.build(lambda: pipe)
    images = torch.stack([image_tensor(image, 64) for image in pairs.images(1)])
    torch.testing.assert_close(cache.latents(1), encode_images(pipe, images))
    embeddings = cache.embeddings(["b", ""])
    expected = family_of(pipe).encode_prompts(pipe, ["b", ""])
    assert set(embeddings) == set(expected) == {"encoder_hidden_states", "text_embeds"}
    for name, rows in embeddings.items():
        torch.testing.assert_close(rows, expected[name])

    # Only what is missing is made again
    missing = next(cache.folder.glob("texts-*"))
    times = {file: file.stat().st_mtime_ns for file in cache.folder.glob("latents-*")}
    missing.unlink()
    Cache(tmp_path / "cache", "sdxl", pairs, resolution=64).build(lambda: pipe)
    assert missing.is_file()
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_a_complete_cache_loads_nothing(tmp_path, pair_file):
    pairs = Pairs(str(pair_file))
    Cache(tmp_path, "sd15", pairs, 64).build(lambda: tiny_pipeline("sd15"))
    Cache(tmp_path, "sd15", pairs, 64).build(lambda: pytest.fail("the encoders were loaded"))


def test_a_cache_of_other_encoders_rows_or_resolution_is_another_folder(tmp_path, pair_file):
    pairs = Pairs(str(pair_file))
    few = Pairs(str(pair_file), limit=2)
    caches = [
        Cache(tmp_path, "a", pairs, 64),
        Cache(tmp_path, "b", pairs, 64),
        Cache(tmp_path, "a", pairs, 32),
        Cache(tmp_path, "a", few, 64),
    ]
    assert len({cache.folder for cache in caches}) == 4


def test_an_incomplete_shard_is_made_again(tmp_path, pair_file, caplog):
    def build():
        cache = Cache(tmp_path, "sd15", Pairs(str(pair_file)), resolution=64)
        cache.build(lambda: tiny_pipeline("sd15"))
        return cache

    shard = next(build().folder.glob("latents-*"))
    complete = shard.read_bytes()
    for incomplete in (complete[: len(complete) // 2], b"", b"\0" * 100):
        shard.write_bytes(incomplete)
        build()
        assert shard.read_bytes() == complete
    assert caplog.text.count("is incomplete") == 3


def test_a_cache_holds_mirrored_images_where_they_are_asked_for(tmp_path, pair_file):
    pipe = tiny_pipeline("sd15")
    pairs = Pairs(str(pair_file))
    gradient = Image.linear_gradient("L").rotate(90).convert("RGB")
    pairs.images = lambda index: [gradient, gradient]
    cache = Cache(tmp_path, "sd15", pairs, resolution=64, flip=True)
    cache.build(lambda: pipe)
    mirrored = torch.stack([image_tensor(image, 64).flip(-1) for image in pairs.images(2)])
    torch.testing.assert_close(cache.latents(2, flip=True), encode_images(pipe, mirrored))
    assert not torch.allclose(cache.latents(2, flip=True), cache.latents(2), atol=1e-3)
