"""The same commands, typed twice in fresh processes and folders, leave the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

from deradiff.data.cache import CHECKSUMS

ROOT = Path(__file__).parents[2]

COMMANDS = {
    "train": "steps=3 data.count=12 optim.pairs_per_step=4 optim.batch_size=2 optim.lr=1e-3 "
    "optim.per_pair=false checkpoint_every=2 log_every=1 panel.every=2 panel.steps=1 "
    "panel.lambdas=[0,1] cpu=true name=x",
    "sample": "anchor=runs/train/x lambdas=[0,0.5,1] prompts_limit=3 steps=2 name=x",
    "sample bake=baked": "anchor=runs/train/x lambdas=[0.5] prompts_limit=3 steps=2 name=baked",
    "eval": "samples=[runs/sample/x] name=x",
}

MEASURED = ("seconds", "device_seconds", "gpu_hours", "pairs_per_second", "memory_gb")
FOLLOW = ("digest", "cards")
"""Keys whose values are measured, and those that follow from one."""

NAMED_BY_PLACE = "runs/cache"
"""Folders here are named by where the data lies and when it was written."""


def type_commands(folder, ranks, threads):
    """Type the commands of all stages in an empty folder."""
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    # Sets of texts have another order in each process.
    environment.pop("PYTHONHASHSEED", None)
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    for command, settings in COMMANDS.items():
        stage, *more = command.split()
        typed = [stage, "tracking=none", *settings.split(), *more]
        done = subprocess.run(
            [sys.executable, "-m", *(launch if ranks > 1 else []), *typed],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def files_left(folder):
    """What lies in a folder: bytes, without what was measured."""
    card = json.loads((folder / "runs/train/x/anchor/anchor.json").read_text())
    hours = [repr(card["gpu_hours"]).encode(), f"{card['gpu_hours']:.3g}".encode()]
    left = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not name.startswith(NAMED_BY_PLACE):
            left[name] = content(file, hours)
    return left


def content(file, hours):
    """What counts of a file."""
    if file.suffix == ".json":
        return without_measured(json.loads(file.read_text()))
    if file.suffix == ".jsonl":
        return [without_measured(json.loads(line)) for line in file.read_text().splitlines()]
    if file.name == "scores.parquet":
        scores = pd.read_parquet(file)
        return scores.drop(columns=[*MEASURED, *FOLLOW], errors="ignore").to_json()
    text = file.read_bytes()
    if file.suffix in (".md", ".html", ".csv", ".tex"):
        for number in hours:
            text = text.replace(number, b"")
    return text


def without_measured(record):
    return {key: value for key, value in record.items() if key not in {*MEASURED, *FOLLOW}}


def encodings(folder):
    """The tensors of the cache, as bytes."""
    found = {}
    for file in (folder / NAMED_BY_PLACE).glob("*/*.safetensors"):
        for name, tensor in load_file(file).items():
            if not name.endswith(CHECKSUMS):
                found[file.name, name] = tensor.numpy().tobytes()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "threads"), [(1, 1), (1, 2), (2, 1)])
def test_the_same_commands_leave_the_same_bytes(tmp_path, ranks, threads):
    for name in ("first", "second"):
        type_commands(tmp_path / name, ranks, threads)
    first = files_left(tmp_path / "first")
    second = files_left(tmp_path / "second")
    assert len(first) > 60
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []
    assert encodings(tmp_path / "first") == encodings(tmp_path / "second")
