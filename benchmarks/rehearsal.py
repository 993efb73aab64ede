"""The README's commands at a published size, with random weights: time, silence and memory of each.

    python -m benchmarks.rehearsal --network sd15 --folder /some/disk     SD1.5, on the CPU: minutes
    python -m benchmarks.rehearsal --network tiny                         to see that it runs

The base model and the pairs are written once. Each command is a process of its own, whose output is
read as it comes: a silence is the time between two bytes of it. Memory is the most that the process
and its children held resident, with libraries and mapped files.
"""

from __future__ import annotations

import argparse
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.gpu.sizes import tiny_pipeline
from benchmarks.random_pipelines import (
    PUBLISHED,
    PipelineSize,
    random_pipeline,
    write_noise_pairs,
)

CAPTIONS = ("a fox in the snow", "a red bicycle", "two cups of tea", "a lighthouse at night")
STEPS = 2
SAMPLER_STEPS = 4
POLL = 0.05
"""Seconds between two looks at a process."""

UNTRACKED = "tracking=none"


@dataclass(frozen=True)
class Rehearsed:
    """One network in one size.

    Attributes:
        pipeline: the size of its networks.
        resolution: pixels of an image's side.
        model: what `model=` calls it.
    """

    pipeline: PipelineSize
    resolution: int
    model: str


NETWORKS = {
    "sd15": Rehearsed(PUBLISHED["sd15"], 512, "sd15"),
    "tiny": Rehearsed(tiny_pipeline("sd15", 1), 64, "sd15"),
}


@dataclass(frozen=True)
class Outcome:
    """What became of a command.

    Attributes:
        name: of the row.
        command: as it was typed.
        seconds: until it ended.
        silence: the longest time without a byte of output.
        memory: the most bytes that its processes held.
        status: its exit status.
        output: all of it.
    """

    name: str
    command: str
    seconds: float
    silence: float
    memory: float
    status: int
    output: str


def prepare(folder: Path, rehearsed: Rehearsed) -> None:
    """Write the base model and the pairs, if they are not there."""
    base = folder / "base"
    if not (base / "model_index.json").exists():
        torch.manual_seed(0)
        pipe = random_pipeline(
            rehearsed.pipeline, CAPTIONS, rehearsed.resolution, "cpu", torch.float16
        )
        pipe.save_pretrained(base)
    pairs = folder / "pairs.parquet"
    if not pairs.exists():
        write_noise_pairs(pairs, len(CAPTIONS), rehearsed.resolution, CAPTIONS)


def commands(folder: Path, rehearsed: Rehearsed) -> dict[str, list[str]]:
    """What is typed, by the name of its row."""
    base = [f"model={rehearsed.model}", f"model.base={folder / 'base'}"]
    base += [f"model.resolution={rehearsed.resolution}"]
    train = ["train", *base, "finetune=lora", "data=table", f"data.path={folder / 'pairs.parquet'}"]
    train += [f"steps={STEPS}", "optim.pairs_per_step=2", "optim.batch_size=1", "precision=no"]
    train += ["log_every=1", "cpu=true", "panel.every=0", f"runs={folder / 'runs'}", "name=lora"]
    anchor = folder / "runs" / "train" / "lora" / "anchor"
    sample = ["sample", f"anchor={anchor}", "lambdas=[0.5]", "prompts=['a fox']"]
    sample += [f"steps={SAMPLER_STEPS}", f"runs={folder / 'runs'}"]
    rows = {"train: dry run": [*train, "data.dry_run=true"], "train: LoRA": train}
    for mode in ("exact", "reuse", "weights"):
        rows[f"sample: {mode}"] = [*sample, f"mode={mode}"]
    rows["sample: bake"] = [*sample, f"bake={folder / 'baked'}", "name=bake"]
    return rows


def rehearse(name: str, words: Sequence[str]) -> Outcome:
    """Run one command to its end."""
    command = [sys.executable, "-m", *words, UNTRACKED]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    start = last = time.monotonic()
    silence = 0.0
    memory = 0.0
    output = b""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        assert process.stdout is not None
        told = process.stdout.fileno()
        while True:
            memory = max(memory, memory_of(process.pid))
            ready, _, _ = select.select([told], [], [], POLL)
            now = time.monotonic()
            if ready:
                chunk = os.read(told, 1 << 16)
                silence = max(silence, now - last)
                last = now
                output += chunk
                if not chunk:
                    break
    seconds = time.monotonic() - start
    text = " ".join(["python", "-m", *words])
    status = process.returncode
    return Outcome(name, text, seconds, silence, memory, status, output.decode(errors="replace"))


def memory_of(pid: int) -> float:
    """The bytes that a process and its children hold now; 0 where it has ended."""
    try:
        own = psutil.Process(pid)
        return sum(each.memory_info().rss for each in [own, *own.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0.0


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a markdown table."""
    lines = [
        "| command | s | longest silence, s | peak memory, GB | status |",
        "|---|---|---|---|---|",
    ]
    for one in outcomes:
        lines.append(
            f"| {one.name} | {one.seconds:.0f} | {one.silence:.1f} | {one.memory / 1e9:.1f} | "
            f"{one.status} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearse every command, and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=tuple(NETWORKS), default="sd15")
    parser.add_argument("--folder", type=Path, help="for the base and the runs; else it goes")
    parser.add_argument("--only", action="append", help="these rows alone")
    options = parser.parse_args(arguments)
    rehearsed = NETWORKS[options.network]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, rehearsed)
        outcomes = []
        for name, words in commands(folder, rehearsed).items():
            if options.only and name not in options.only:
                continue
            outcome = rehearse(name, words)
            outcomes.append(outcome)
            print(f"{table([outcome]).splitlines()[-1]}", flush=True)
            (folder / f"{name.replace(': ', '-').replace(' ', '-')}.log").write_text(
                f"$ {outcome.command}\n{outcome.output}"
            )
    print("\n" + table(outcomes))
    return int(any(outcome.status for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
