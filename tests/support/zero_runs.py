"""The train stage on two ranks under DDP and under ZeRO, for tests/training/test_deepspeed.py.

    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 -m tests.support.zero_runs <folder> [<run> ...]

All runs are made by one pair of processes, since starting them takes most of the time.
`<folder>/results.json` tells for each run under ZeRO how far it ended from the same run under DDP.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train.stage
from deradiff.training.loop import train as train_loop
from deradiff.training.preemption import Preempted
from tests.support.tiny_pipelines import save_tiny
from tests.support.train_runs import small_run
from train.config import TrainConfig

DDP = 0  # as a number of a ZeRO stage
STEPS = 6
STOP = 3  # a run is stopped in the step after this one

# A file of one's own, whose numbers are not the run's, and which splits the smallest weights too.
FILE = {
    "gradient_clipping": 5.0,
    "gradient_accumulation_steps": 3,
    "train_micro_batch_size_per_gpu": 7,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class Run(NamedTuple):
    """A run, and what is asked of it.

    Attributes:
        changes: of the config, by section.
        stages: of ZeRO, under which it is made.
        stopped: it gets a SIGTERM, and is started again.
        moved: it is stopped under DDP and goes on under ZeRO, and the other way round.
        file: DeepSpeed reads FILE.
    """

    changes: dict[str, Any]
    stages: tuple[int, ...] = (1, 2, 3)
    stopped: bool = False
    moved: bool = False
    file: bool = False


FULL = {"finetune": {"method": "full"}}
RUNS = {
    # Three micro-batches, of which one rank has one and repeats another that does not count.
    "lora-clip-accumulation": Run({"optim": {"clip": 1e-3, "pairs_per_step": 6}}),
    "full-noclip-stopped": Run({**FULL, "optim": {"clip": 0.0}}, stopped=True),
    "full-average-stopped": Run({**FULL, "optim": {"ema": 0.9}}, stopped=True),
    "lora-average-moved": Run({"optim": {"ema": 0.9}}, (2, 3), moved=True),
    "lora-nocache-panel-file": Run(
        {
            "data": {"cache": False},
            "optim": {"ema": 0.9},
            "panel": {"every": 3, "steps": 1, "prompts": ["a red circle"], "lambdas": [1.0]},
        },
        (3,),
        file=True,
    ),
    "full-file-moved": Run(FULL, (3,), moved=True, file=True),
    "pretrain-checkpointing": Run(
        {
            **FULL,
            "objective": "pretrain",
            "data": {"source": "shapes_images"},
            "model": {"gradient_checkpointing": True},
        },
        (3,),
    ),
    # DeepSpeed's autocast stays on for the life of a process: these are the last.
    "lora-bf16": Run({"precision": "bf16", "optim": {"lr": 1e-5}}),
    "full-bf16-stopped": Run({**FULL, "precision": "bf16", "optim": {"lr": 1e-5}}, stopped=True),
}


class Result(NamedTuple):
    """What a run under ZeRO has in common with the one under DDP.

    Attributes:
        apart: how far its weights ended from the other's, as a share of the way that training has
            moved them.
        loss: of the first step, over the other's.
        norm: of the first gradient, over the other's.
    """

    apart: float
    loss: float
    norm: float


def config_of(base: Path, runs: Path, name: str) -> TrainConfig:
    """The config of a run; it evaluates the reference itself."""
    config = replace(small_run(base, runs), name=name, steps=STEPS)
    changes: dict[str, Any] = {"dpo": {"reference_errors": False}, **RUNS[name].changes}
    for key, value in changes.items():
        if isinstance(value, dict):
            changes[key] = replace(getattr(config, key), **value)
    return replace(config, **changes)


def go(config: TrainConfig, stage: int, file: Path | None = None, stop: bool = False) -> Path:
    """Start a run, under DDP or a stage of ZeRO.

    Args:
        config: of the run.
        stage: DDP, or of ZeRO.
        file: DeepSpeed's own config.
        stop: with a SIGTERM to the main process.

    Returns:
        The run directory.
    """
    # How `accelerate launch` tells its processes.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(stage != DDP).lower()
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "5"
    os.environ.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", None)
    if file is not None and stage != DDP:
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(file)
    config = replace(config, cpu=stage == DDP)
    run_dir = Path(config.runs) / "train" / config.run_name()

    def train_and_stop(*arguments: Any) -> Any:
        *others, log, show = arguments

        def log_and_stop(row: dict[str, float], step: int) -> None:
            log(row, step)
            if stop and step == STOP:
                os.kill(os.getpid(), signal.SIGTERM)

        return train_loop(*others, log_and_stop, show)

    train.stage.train = train_and_stop
    try:
        train.stage.run(config, run_dir)
        assert not stop, "the signal did not stop it"
    except Preempted:
        assert stop
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return run_dir


def compare(run_dir: Path, other: Path, base: Path) -> Result:
    """A run under ZeRO with the one under DDP."""
    # The weights. Of a LoRA only the matrices that start at zero tell how far it has moved.
    start = load_file(base / "unet/diffusion_pytorch_model.safetensors")
    ended = load_file(weights_of(other))
    apart = 0.0
    moved = 0.0
    for name, value in load_file(weights_of(run_dir)).items():
        if name in start or "lora_B" in name or "lora.up" in name:
            apart += float((value - ended[name]).double().square().sum())
            moved += float((ended[name] - start.get(name, 0.0)).double().square().sum())

    # The first lines of their metrics.
    row, others = (first_metrics(run) for run in (run_dir, other))
    ratios = [row[key] / others[key] for key in ("loss", "grad_norm")]
    return Result((apart / moved) ** 0.5, *ratios)


def first_metrics(run_dir: Path) -> dict[str, float]:
    """The metrics of a run's first step."""
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])


def weights_of(run_dir: Path) -> Path:
    """The file of what a run has trained: an anchor, or the network of a pipeline."""
    files = [*run_dir.glob("anchor/**/*.safetensors"), *run_dir.glob("pipeline/unet/*.safetensors")]
    return files[0]


def make_base(folder: Path) -> Path:
    """A tiny base model, which the main process makes and the others wait for."""
    base = folder / "base"
    if os.environ["RANK"] == "0":
        save_tiny("sd15", folder / "base.part").rename(base)
    while not base.is_dir():
        time.sleep(0.1)
    return base


def main() -> None:
    folder = Path(sys.argv[1])
    names = sys.argv[2:]
    torch.set_num_threads(1)
    base = make_base(folder)
    file = folder / f"zero{os.environ['RANK']}.json"
    file.write_text(json.dumps(FILE))

    # One process group for all runs: each would destroy it at its end.
    PartialState.destroy_process_group = lambda self, group=None: None  # type: ignore[assignment]

    results = {}
    for name in names or RUNS:
        run = RUNS[name]
        ddp = go(config_of(base, folder / "ddp", name), DDP)
        for stage in run.stages:
            # Under what it begins, and under what it ends.
            ways = [(stage, stage)]
            if run.moved:
                ways = [(DDP, stage), (stage, DDP)]
            for first, last in ways:
                # Each makes its own cache.
                config = config_of(base, folder / f"{first}{last}", name)
                if run.stopped or run.moved:
                    go(config, first, file if run.file else None, stop=True)
                run_dir = go(config, last, file if run.file else None)
                panels = list((run_dir / "panel").glob("step-*.png"))
                assert bool(panels) == bool(config.panel.every)
                if os.environ["RANK"] == "0":
                    key = f"{name} {first}{last}"
                    results[key] = compare(run_dir, ddp, base)._asdict()
                    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
