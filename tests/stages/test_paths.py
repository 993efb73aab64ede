"""Paths that users type: every place has one name, and a place that is not there is answered."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval.config import EvalConfig, ScorerConfig
from sample.config import ModelConfig as SampleModel
from sample.config import SampleConfig
from train.config import DataConfig, TrainConfig
from train.config import ModelConfig as TrainModel

HEAVY = ("torch", "diffusers", "transformers", "pandas", "numpy", "pyarrow")
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


# What is answered at once where nothing is


@pytest.fixture
def runs(home):
    """A run of each stage, and what else the keys name."""
    for folder, file, text in (
        ("sample/a", "manifest.jsonl", json.dumps({"anchor": ANCHOR}) + "\n"),
        ("sample/b", "manifest.jsonl", "torn"),
        ("eval/a", "scores.parquet", ""),
        ("train/half-seed0", "config.yaml", ""),
        ("train/c-seed1/anchor", "anchor.json", "{}"),
    ):
        path = home / "runs" / folder / file
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (home / "pairs.parquet").write_text("")
    (home / "words.txt").write_text("a fox")
    return home / "runs"


def refusal(config):
    with pytest.raises(ValueError) as error:
        config.check_paths()
    assert "\n" not in str(error.value)
    return str(error.value)


ANCHORS = {
    "runs/tain/a-seed0/anchor": f"is not there; do you mean anchor={ANCHOR}?",
    "runs/train/zzz": "is not there; in runs/train there are a-seed0, c-seed1, half-seed0",
    "gone": "is not there: give a folder or LoRA file that exists, or a hub id",
    "runs/sample/a": f"is a folder of samples: give the anchor that they are of, anchor={ANCHOR}",
    "runs/eval/a": f"is an evaluation: give anchor={ANCHOR}",
    "runs/train/half-seed0": "holds no anchor yet: run its python -m train command to its end",
    "runs/train/half-seed0/anchor": "holds no anchor yet: run its python -m train command",
    "runs/train": "holds several runs: give one, as in anchor=runs/train/a-seed0",
}


@pytest.mark.parametrize("anchor", ANCHORS)
def test_an_anchor_that_is_none_is_answered_with_one_that_is(runs, anchor):
    assert ANCHORS[anchor] in refusal(SampleConfig(anchor=anchor))


SAMPLES = {
    "runs/sampel/a": "is not there; do you mean runs/sample/a?",
    "runs/sample/zzz": "is not there; in runs/sample there are a, b",
    "gone": "is not there: give a folder that python -m sample wrote",
    ANCHOR: "is an anchor: give its samples, 'samples=[runs/sample/a]'",
    "runs/train/c-seed1": "sample it first, python -m sample anchor=runs/train/c-seed1/anchor",
    "runs/eval/a": "is an evaluation",
    "runs/sample": "give 'samples=[runs/sample/a,runs/sample/b]'",
    "runs/sample/a/manifest.jsonl": "give 'samples=[runs/sample/a]'",
}


@pytest.mark.parametrize("run", SAMPLES)
def test_samples_that_are_none_are_answered_with_some_that_are(runs, run):
    scorers = {"vivid": ScorerConfig()}
    assert SAMPLES[run] in refusal(EvalConfig(samples=[run], scorers=scorers))


def test_every_other_path_of_a_command_is_looked_for(runs):
    sampled = {
        "do you mean prompts=words.txt?": {"prompts": "word.txt"},
        "do you mean prompts=drawbench?": {"prompts": "drawbnch"},
        "one of shapes, pickapic": {"prompts": "a fox"},
        "model.base=./gone is not there": {"model": SampleModel(base="./gone")},
        "model.vae=runs/vae is not there": {"model": SampleModel(vae="runs/vae")},
    }
    for words, options in sampled.items():
        assert words in refusal(SampleConfig(anchor=ANCHOR, **options))
    data = DataConfig(path="pair.parquet")
    assert "do you mean data.path=pairs.parquet?" in refusal(train_config(data=data))
    data = DataConfig(path="here/pairs.parquet")
    assert "data.path=here/pairs.parquet is not there: give" in refusal(train_config(data=data))
    scorers = {"mine": ScorerConfig(file="my.py")}
    config = EvalConfig(samples=["runs/sample/a"], scorers=scorers)
    assert "scorers.mine.file=my.py is not there" in refusal(config)


def train_config(**options):
    model = TrainModel(name="m", base="asset:shapes/base")
    return TrainConfig(model=model, **options)


def test_what_is_there_or_may_be_on_the_hub_is_left_to_the_stage(runs):
    for anchor in (ANCHOR, "org/name", "org/name/folder/file.safetensors"):
        SampleConfig(anchor=anchor, prompts="shapes").check_paths()
    SampleConfig(anchor=ANCHOR, prompts="words.txt").check_paths()
    SampleConfig(anchor=ANCHOR, prompts=["a fox"], model=SampleModel(base="org/b")).check_paths()
    train_config(data=DataConfig(path="org/name")).check_paths()
    train_config(data=DataConfig(path="pairs.parquet")).check_paths()
    scorers = {"hpsv2": ScorerConfig(checkpoint="org/name/file.pt")}
    EvalConfig(samples=["runs/sample/b"], scorers=scorers).check_paths()


@pytest.mark.parametrize("stage", ["train", "sample", "eval"])
def test_paths_are_looked_at_before_anything_heavy_loads(stage):
    program = f"import sys, {stage}.config; print({{*{HEAVY}}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
