"""The examples run as they stand, on the shapes world."""

import runpy
from pathlib import Path

from PIL import Image

import deradiff
from deradiff.realignment.registry import MODES

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
