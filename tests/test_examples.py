"""The examples run as they stand, on the shapes world."""

import copy
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from PIL import Image

import deradiff
from deradiff.realignment.registry import MODES
from tests.support.tiny_pipelines import save_tiny

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name, folder, monkeypatch, *arguments):
    """Run an example in a folder, as `python examples/<name>` does."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_train_anchor(tmp_path, monkeypatch, capsys):
    run_example("train_anchor.py", tmp_path, monkeypatch, "--steps", "3")
    folder = tmp_path / "runs/train_anchor"
    card = deradiff.load_anchor(folder / "anchor").card
    assert (card.beta, card.method, card.steps) == (500.0, "lora", 3)
    assert (folder / "metrics.jsonl").is_file()
    assert Image.open(folder / "image.png").size == (32, 32)
    assert "at lam=0.5" in capsys.readouterr().out


def test_realign(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)  # as `python examples/realign.py` does
    run_example("realign.py", tmp_path, monkeypatch, "--steps", "4")
    lines = capsys.readouterr().out.splitlines()
    (reference,) = [line for line in lines if line.startswith("lam 0 ")]
    assert " ".join(reference.split()).startswith("lam 0 path KL 0 nats 1.00 network evaluations")
    costs = [line for line in lines if line.startswith("mode ")]
    assert [line.split()[1] for line in costs] == list(MODES)
    page = (EXAMPLES.parent / "docs/dial.md").read_text()
    example = (EXAMPLES / "realign.py").read_text()
    for shown in ("ByBranch(", "ramp(", "particles=4", "torch.tensor([0.0, 0.5, 1.0])"):
        assert shown in page and shown in example
    grid = Image.open(tmp_path / "runs/realign/grid.png")
    assert grid.width > grid.height > 0


def write_peft_lora(folder, transformer, seed):
    """A LoRA as peft saves it alone, in the layout, rank and alpha of the published ones."""
    model = get_peft_model(
        copy.deepcopy(transformer),
        LoraConfig(r=32, lora_alpha=64, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    )
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.02, generator=generator)
    model.save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.slow
def test_the_published_curve_on_stand_ins(tmp_path):
    """`fdfo_curve.sh` on a tiny pipeline of SD3's, and LoRAs in the published folders."""
    base = save_tiny("sd3", tmp_path / "base")
    transformer = SD3Transformer2DModel.from_pretrained(base / "transformer")
    for seed, epoch in enumerate((20, 50, 100)):
        folder = tmp_path / f"loras/fdfo-combined-reward-no-cfg/epoch-{epoch:07d}"
        write_peft_lora(folder, transformer, seed)
    (tmp_path / "prompts.txt").write_text("a fox\na boat\na red house\na hill\n")
    sampling = f"model=sd3 model.base={base} prompts=prompts.txt steps=2 guidance_scale=1"
    settings = {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(EXAMPLES.parent),
        "WANDB_MODE": "disabled",
        "ANCHORS": "loras",
        "EPOCHS": "20 50",
        "LAST": "100",
        "LAMBDAS": "[0,0.5,1]",
        "SAMPLING": f"{sampling} height=32 width=32 tracking=none",
        "SCORE": "colourful",
        "SCORERS": "scorers=colourful",
    }
    subprocess.run(
        ["bash", EXAMPLES / "fdfo_curve.sh"], cwd=tmp_path, env=os.environ | settings, check=True
    )
    evaluated = tmp_path / "runs/eval/fdfo-combined-reward-no-cfg"
    table = pd.read_csv(evaluated / "tables/early_stopping.csv")
    assert list(table["checkpoint"]) == [20, 50]
    assert (table["path_kl"] > 0).all() and (table["images"] == 4).all()
    assert (evaluated / "plots/early_stopping.pdf").is_file()
