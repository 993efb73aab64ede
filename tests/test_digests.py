"""What was written is told from what was not, and weights from other weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deradiff.digests import (
    anchor_digest,
    is_as_written,
    sealed,
    sort_metadata,
    unsealed,
    write_with_digest,
)


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


def test_a_record_tells_whether_it_is_what_was_written():
    record = sealed({"b": 1.5, "a": [None, "ü"]})
    again = json.loads(json.dumps(record))
    assert unsealed(again) == {"b": 1.5, "a": [None, "ü"]}
    assert unsealed({"b": 1}) == {"b": 1}, "records of earlier versions have no digest"
    for damaged in (again | {"b": 1.25}, again | {"c": 1}, [1], None):
        with pytest.raises(ValueError, match="it is no"):
            unsealed(damaged)


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
