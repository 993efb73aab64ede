"""A run directory holds the run of one config."""

from __future__ import annotations

import pytest
import yaml

from deradiff.run_directories import claim


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
