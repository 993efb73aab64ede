"""Names that are safe, files that are whole or not there, and run directories that hold one run."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deradiff.files import (
    anchor_digest,
    append_line,
    claim,
    is_as_written,
    locate,
    sealed,
    slug,
    sort_metadata,
    unsealed,
    write_atomic,
    write_with_digest,
    writing,
)


def test_an_asset_is_a_folder_that_ships_and_anything_else_stays_as_it_is():
    assert os.path.isdir(locate("asset:shapes/base"))
    assert locate("org/name") == "org/name"
    with pytest.raises(ValueError, match=r"ships no asset:none; it ships .*asset:shapes/base"):
        locate("asset:none")


def test_names_are_safe_and_different_texts_have_different_names():
    assert slug("lora-beta=500_1.0") == "lora-beta=500_1.0"
    names = {slug(text) for text in ("a/b", "a b", "a:b", "a-b", "..", "", "/")}
    assert len(names) == 7
    assert all("/" not in name and not name.startswith(".") for name in names)
    assert len(slug("x" * 500)) < 100


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    file = tmp_path / "new" / "file.txt"
    write_atomic(file, "old")

    def no_space(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        write_atomic(file, b"a longer text")
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file], "nothing is left aside"


def test_a_disk_without_room_is_named_with_the_file(tmp_path):
    file = tmp_path / "a.bin"
    for error in (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("No space left\non device (os error 28)"),
        RuntimeError("No space left on device: unexpected pos"),
    ):
        message = r"a.bin cannot be written \(No space left on device.*\): make room"
        with pytest.raises(OSError, match=message), writing(file):
            raise error


def test_a_file_with_a_digest_is_as_written_or_removed(tmp_path, caplog):
    file = tmp_path / "a.parquet"
    assert not is_as_written(file)
    write_with_digest(file, b"abc")
    assert is_as_written(file)
    file.write_bytes(b"abd")
    assert not is_as_written(file)
    assert not file.exists()
    assert f"{file} is not what was written, and is made again" in caplog.text
    (tmp_path / "older").touch()
    assert is_as_written(tmp_path / "older")


def test_a_line_stands_alone_also_behind_a_torn_one(tmp_path):
    file = tmp_path / "lines.jsonl"
    append_line(file, "1")
    append_line(file, "2")
    file.write_bytes(file.read_bytes() + b'{"torn')
    append_line(file, "3")
    assert file.read_text() == '1\n2\n{"torn\n3\n'


def test_a_record_tells_whether_it_is_what_was_written():
    record = sealed({"b": 1.5, "a": [None, "ü"]})
    again = json.loads(json.dumps(record))
    assert unsealed(again) == {"b": 1.5, "a": [None, "ü"]}
    assert unsealed({"b": 1}) == {"b": 1}, "records of earlier versions have no digest"
    for damaged in (again | {"b": 1.25}, again | {"c": 1}, [1], None):
        with pytest.raises(ValueError, match="it is no"):
            unsealed(damaged)


def test_the_same_config_resumes_and_another_is_refused_by_its_keys(tmp_path):
    config = {"seed": 0, "optim": {"lr": 0.1, "name": "adamw"}}
    claim(tmp_path, config)
    claim(tmp_path, config)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config

    other = {"seed": 1, "optim": {"lr": 0.2, "name": "adamw"}}
    message = r"another config: optim.lr \(0.1 there, 0.2 here\), seed \(0 there, 1 here\)"
    with pytest.raises(ValueError, match=message):
        claim(tmp_path, other)
    with pytest.raises(ValueError, match=r"another config: seed \(0 there, 1 here\);"):
        claim(tmp_path, other, ignore=("optim",))
    claim(tmp_path, other, ignore=("optim", "seed"))


def test_a_damaged_config_is_named_and_what_killed_writers_left_is_removed(tmp_path):
    claim(tmp_path, {"seed": 0})
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/.compute.md.7.part").touch()
    (tmp_path / "checkpoints/.part/deepspeed").mkdir(parents=True)
    (tmp_path / "manifest.0.part").touch()
    claim(tmp_path, {"seed": 0})
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["checkpoints", "config.yaml", "manifest.0.part", "tables"]

    file = tmp_path / "config.yaml"
    whole = file.read_bytes()
    for content in (whole.replace(b"seed: 0", b"seed: 8"), b"\xff", b"seed: [", b"- 1"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"config.yaml is not what was written: .* remove"):
            claim(tmp_path, {"seed": 0})
    # One of an earlier version holds no digest.
    file.write_text("seed: 0\n")
    claim(tmp_path, {"seed": 0})
    assert file.read_bytes() == whole


def test_weights_are_told_apart_and_a_rewritten_header_changes_nothing(tmp_path):
    weights = {"a": torch.zeros(2), "b": torch.ones(2)}
    save_file(weights, tmp_path / "one.safetensors", metadata={"x": "1", "y": "2"})
    save_file(weights, tmp_path / "two.safetensors", metadata={"y": "2", "x": "1"})
    save_file(weights | {"a": torch.ones(2)}, tmp_path / "three.safetensors")
    one, two, three = (
        anchor_digest(tmp_path / f"{name}.safetensors") for name in ("one", "two", "three")
    )
    assert one == two
    assert one != three
    assert len(one) == 16
    assert anchor_digest("org/name") is None

    # A file that changes is read again, and one that is no safetensors file counts as its bytes.
    content = (tmp_path / "one.safetensors").read_bytes()
    for damaged in (content[:-1] + b"\1", b"\xff" * 20, b""):
        (tmp_path / "one.safetensors").write_bytes(damaged)
        assert anchor_digest(tmp_path / "one.safetensors") not in (None, one)


def test_sorted_metadata_makes_equal_tensors_equal_files(tmp_path):
    weights = {"a": torch.arange(3), "b": torch.ones(2)}
    texts = {name: f'é"\\\n\x7f{name}' for name in "abcdef"}
    contents = set()
    for attempt in range(8):
        file = tmp_path / f"{attempt}.safetensors"
        save_file(weights, file, metadata=texts)
        sort_metadata(file)
        contents.add(file.read_bytes())
    assert len(contents) == 1
    assert torch.equal(load_file(file)["a"], weights["a"])
