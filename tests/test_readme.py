"""The examples of README and of the documents are right.

Blocks of Python run as they stand, on tiny pipelines in place of the published ones. Commands of
the three stages compose: their keys and choices exist, and their values are accepted.
"""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest
from diffusers import DDIMScheduler
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from configs.entry import CONFIGS
from tests.support.realign_world import BASES

ROOT = Path(__file__).parents[1]
STAGES = ("train", "sample", "eval")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = ("<", "...", "$", "[--")
"""A command with one of these is not complete."""


def blocks(page, language):
    """The fenced blocks of a page in a language; "": in none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [text for named, text in fenced if named == language]


def python_blocks():
    """The blocks of Python of the pages that a reader may type off."""
    found = []
    for name in ("README.md", "docs/dial.md"):
        for index, block in enumerate(blocks(ROOT / name, "python")):
            found.append(pytest.param(block, id=f"{name}-{index}"))
    return found


def commands():
    """The complete commands of a stage in all pages, as words: (train, key=value, ...)."""
    found = []
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.search(rf"(?:python|launch) -m ({'|'.join(STAGES)})\b(.*)", line)
                if command is None or any(mark in line for mark in PLACEHOLDERS):
                    continue
                words = [command[1], *shlex.split(command[2], comments=True)]
                found.append(pytest.param(words, id=f"{page.name}: {' '.join(words)}"))
    return found


@pytest.mark.filterwarnings("ignore:lam .* lies beyond", "ignore:with classifier-free guidance")
@pytest.mark.parametrize("block", python_blocks())
def test_a_block_of_python_runs_as_it_stands(block, worlds, tmp_path, monkeypatch):
    sdxl = worlds["sdxl"]
    BASES["sdxl"].save_pretrained(tmp_path / "sdxl")
    names = {
        "stabilityai/stable-diffusion-xl-base-1.0": str(tmp_path / "sdxl"),
        "mhdang/dpo-sdxl-text2image-v1": str(sdxl.anchors["full1"]),
        "runs/train/sdxl-lora-beta2000-seed0/anchor": str(sdxl.anchors["lora1"]),
    }
    for published, tiny in names.items():
        block = block.replace(published, tiny)
    set_timesteps = DDIMScheduler.set_timesteps

    def set_few(scheduler, steps, *arguments, **options):
        """Whatever a pipeline asks for: its default is fifty."""
        set_timesteps(scheduler, min(steps, 4), *arguments, **options)

    monkeypatch.setattr(DDIMScheduler, "set_timesteps", set_few)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(block)
    assert runpy.run_path(str(tmp_path / "example.py"))["image"].size == (64, 64)


def test_there_is_an_example_and_it_turns_the_dial():
    first = python_blocks()[0].values[0]
    assert "deradiff.realign(" in first and "dial.lam = " in first


@pytest.mark.parametrize("words", commands())
def test_a_command_composes(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage, *overrides = [word for word in words if not word.startswith("--")]
    if "--help" in words:
        return
    if "--multirun" in words:
        # The first value of each sweep
        overrides = [re.sub(r"=([^\[,]+),.*", r"=\1", override) for override in overrides]
    importlib.import_module(f"{stage}.__main__")  # it registers the schema
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = OmegaConf.to_object(compose(stage, overrides))
    assert config.run_name()


def test_each_stage_has_a_command_in_the_readme():
    in_readme = [str(command.id) for command in commands()]
    for stage in STAGES:
        assert any(name.startswith(f"README.md: {stage} ") for name in in_readme)
