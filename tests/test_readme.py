"""The examples of README and docs/dial.md run: the code blocks as they stand there, on tiny
pipelines in place of the published ones."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.support.realign_world import BASES

ROOT = Path(__file__).parents[1]
BLOCKS = [
    pytest.param(block, id=f"{page}-{i}")
    for page in ("README.md", "docs/dial.md")
    for i, block in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    )
]


@pytest.mark.filterwarnings("ignore:lam .* lies beyond", "ignore:with classifier-free guidance")
@pytest.mark.parametrize("block", BLOCKS)
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
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(block)
    assert runpy.run_path(str(tmp_path / "example.py"))["image"].size == (64, 64)


def test_there_is_an_example_and_it_turns_the_dial():
    first = BLOCKS[0].values[0]
    assert "deradiff.realign(" in first and "dial.lam = " in first
