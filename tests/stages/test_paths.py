"""Paths that users type: every place has one name, however it is written."""

import json
from pathlib import Path

import pytest

from eval.config import EvalConfig, ScorerConfig
from sample.config import SampleConfig

ANCHOR = "runs/train/a-seed0/anchor"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working folder with a finished train run, its runs on another disk behind a link."""
    disk = tmp_path / "disk"
    folder = disk / "train/a-seed0/anchor"
    folder.mkdir(parents=True)
    (folder / "anchor.json").write_text(json.dumps({"family": "sdxl"}))
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")
    home = tmp_path / "home"
    home.mkdir()
    (home / "runs").symlink_to(disk)
    (home / "latest").symlink_to("runs/train/a-seed0")
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize(
    "written",
    [
        "runs/train/a-seed0",
        "runs/train/a-seed0/",
        "./runs/train/../train/a-seed0/anchor/",
        "runs/train/a-seed0/anchor/pytorch_lora_weights.safetensors",
        "latest",
        "latest/anchor",
        "{home}/runs/train/a-seed0",
        "{home}/../disk/train/a-seed0/anchor",
    ],
)
def test_an_anchor_has_one_name_and_makes_one_run(home, written):
    config = SampleConfig(anchor=written.format(home=home))
    assert config.anchors == [ANCHOR]
    assert config.run_name() == SampleConfig(anchor=ANCHOR).run_name()
    assert config.run_name().startswith("a-seed0-exact-euler")


def test_an_anchor_is_not_mixed_with_itself(home):
    with pytest.raises(ValueError, match=f"anchor holds {ANCHOR} twice"):
        SampleConfig(anchor=[ANCHOR, "latest"])
    assert SampleConfig(anchor=[ANCHOR]).anchor == ANCHOR


def test_an_anchor_elsewhere_has_its_whole_path_and_a_hub_id_its_own(home, tmp_path):
    elsewhere = tmp_path / "b"
    elsewhere.mkdir()
    assert SampleConfig(anchor="../b").anchors == [str(elsewhere.resolve())]
    assert SampleConfig(anchor="org/name/").anchors == ["org/name"]


def test_a_file_of_the_hubs_cache_keeps_its_name(home):
    blob = home / "0123abcd"
    blob.write_bytes(b"")
    link = home / "lora.safetensors"
    link.symlink_to(blob)
    assert SampleConfig(anchor="./lora.safetensors").anchors == ["lora.safetensors"]


def test_a_run_of_samples_has_one_name(home):
    Path("runs/sample/a").mkdir(parents=True)
    Path("best").symlink_to("runs/sample/a")
    scorers = {"vivid": ScorerConfig()}
    config = EvalConfig(samples=["runs/sample/a"], scorers=scorers)
    for written in ("./runs/sample/a/", "best", f"{home}/runs/sample/a"):
        other = EvalConfig(samples=[written], scorers=scorers)
        assert other.samples == config.samples
        assert other.run_name() == config.run_name()
        with pytest.raises(ValueError, match=r"name runs/sample/a more than once"):
            EvalConfig(samples=["runs/sample/a"], references=[written], scorers=scorers)
