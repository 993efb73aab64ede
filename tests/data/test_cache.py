"""Encodings: equal to what the pipeline encodes, complete, and made once."""

import pytest
import torch
from PIL import Image

from deradiff.data import cache as cache_module
from deradiff.data.cache import Cache, encode_images, images_at_once
from deradiff.data.pairs import BrokenImage, Pairs, image_tensor
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


def test_no_changed_byte_of_a_shard_is_trained_on(tmp_path, pair_file):
    def built():
        cache = Cache(tmp_path, "sd15", Pairs(str(pair_file)), resolution=64)
        cache.build(lambda: tiny_pipeline("sd15"))
        return cache

    def content(cache):
        parts = [cache.latents(index) for index in range(len(cache.data))]
        parts += cache.embeddings(cache.captions).values()
        return b"".join(part.contiguous().numpy().tobytes() for part in parts)

    cache = built()
    expected = content(cache)
    for shard in sorted(cache.folder.glob("*.safetensors")):
        whole = shard.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        names = shard.name.encode()
        for place in (header - 20, header + 1, len(whole) // 2, len(whole) - 1):
            spoilt = bytearray(whole)
            spoilt[place] ^= 4
            shard.write_bytes(spoilt)
            try:
                assert content(built()) == expected, (names, place)
            except ValueError as error:
                assert f"{shard} is not what was written" in str(error)
                assert not shard.exists()
            built()
            assert shard.read_bytes() == whole


def test_a_shard_in_the_place_of_another_is_refused(tmp_path, pair_file):
    cache = Cache(tmp_path, "sd15", Pairs(str(pair_file)), resolution=64, flip=True)
    cache.build(lambda: tiny_pipeline("sd15"))
    shard = next(cache.folder.glob("flipped-*"))
    shard.write_bytes((cache.folder / shard.name.replace("flipped", "latents")).read_bytes())
    again = Cache(tmp_path, "sd15", Pairs(str(pair_file)), resolution=64, flip=True)
    again.build(lambda: tiny_pipeline("sd15"))
    with pytest.raises(ValueError, match="is not what was written"):
        again.latents(0, flip=True)


def test_a_cache_holds_mirrored_images_where_they_are_asked_for(tmp_path, pair_file):
    pipe = tiny_pipeline("sd15")
    pairs = Pairs(str(pair_file))
    gradient = Image.linear_gradient("L").rotate(90).convert("RGB")
    pairs.decode = lambda index, encoded: [gradient, gradient]
    cache = Cache(tmp_path, "sd15", pairs, resolution=64, flip=True)
    cache.build(lambda: pipe)
    mirrored = torch.stack([image_tensor(image, 64).flip(-1) for image in pairs.images(2)])
    torch.testing.assert_close(cache.latents(2, flip=True), encode_images(pipe, mirrored))
    assert not torch.allclose(cache.latents(2, flip=True), cache.latents(2), atol=1e-3)


@pytest.mark.parametrize(
    ("resolution", "dtype", "count"),
    [
        (1024, torch.float16, 8),  # 13 GB of SDXL's autoencoder
        (1024, torch.float32, 4),
        (512, torch.bfloat16, 32),
        (4096, torch.float32, 1),
    ],
)
def test_the_autoencoder_gets_as_many_images_at_once_as_fit(resolution, dtype, count):
    assert images_at_once(resolution, dtype) == count


def test_no_call_of_the_autoencoder_is_larger_than_memory_allows(tmp_path, pair_file, monkeypatch):
    pipe = tiny_pipeline("sdxl")
    pairs = Pairs(str(pair_file))
    whole = Cache(tmp_path / "whole", "sdxl", pairs, resolution=64)
    whole.build(lambda: pipe)

    # Three images at once: a pair a batch, and a batch of five in two calls
    monkeypatch.setattr(cache_module, "BYTES_AT_ONCE", 3 * 64 * 64 * 4)
    sizes = []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x, *a: sizes.append(len(x)) or encode(x, *a))
    small = Cache(tmp_path / "small", "sdxl", pairs, resolution=64)
    small.build(lambda: pipe)
    assert set(sizes) == {2}
    for index in range(len(pairs)):
        torch.testing.assert_close(small.latents(index), whole.latents(index))
    sizes.clear()
    assert len(encode_images(pipe, torch.zeros(5, 3, 64, 64))) == 5
    assert sizes == [3, 2]


def test_images_are_decoded_ahead_and_stay_in_order(tmp_path, pair_file, monkeypatch):
    """A broken one in between is skipped, whichever thread meets it."""
    pipe = tiny_pipeline("sd15")
    pairs = Pairs(str(pair_file), max_broken=0.9)
    decode = pairs.decode

    def slow_or_broken(index, encoded):
        if index == 1:
            raise BrokenImage("row 1 has a broken image")
        return decode(index, encoded)

    monkeypatch.setattr(pairs, "decode", slow_or_broken)
    monkeypatch.setattr(cache_module, "BYTES_AT_ONCE", 2 * 64 * 64 * 4)
    cache = Cache(tmp_path / "cache", "sd15", pairs, resolution=64)
    cache.build(lambda: pipe)
    assert set(pairs.broken) == {1}
    for index in (0, 2, len(pairs) - 1):
        images = torch.stack([image_tensor(image, 64) for image in pairs.images(index)])
        torch.testing.assert_close(cache.latents(index), encode_images(pipe, images))
