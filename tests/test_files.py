"""Names that are safe, files that are whole or not there, and run directories that hold one run."""

from __future__ import annotations

import os

import pytest
import torch
import yaml
from safetensors.torch import save_file

from deradiff.files import anchor_digest, claim, locate, slug, write_atomic


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
