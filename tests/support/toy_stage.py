"""A stage for tests of the command line: it prints what it was given, and fails as `data` says.

The fixture `toy` copies this file to `toy/stage.py`, and runs `python -m toy`.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from httpx import ConnectTimeout

from configs.entry import entry
from deradiff.assets import locate


@dataclass
class DPO:
    beta: float = 2000.0

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError(f"dpo.beta must be above 0, not {self.beta}")


@dataclass
class Model:
    base: str | None = None


@dataclass
class Toy:
    data: str = "???"
    lambdas: list[float] = field(default_factory=lambda: [0.0])
    dpo: DPO = field(default_factory=DPO)
    model: Model = field(default_factory=Model)
    runs: str = "runs"
    name: str | None = None

    def check_paths(self):
        if self.data == "nowhere":
            raise ValueError("data=nowhere is not there")

    def run_name(self):
        return self.name or f"beta{self.dpo.beta:g}"


def run(config, run_dir):
    beta = config.dpo.beta
    print(f"beta {beta:g} base {config.model.base} in {run_dir}", flush=True)
    print(f"threads {os.environ.get('OMP_NUM_THREADS')} pid {os.getpid()}", flush=True)
    if config.data == "none":
        raise FileNotFoundError("there is no data")
    if config.data == "strange":
        locate("asset:a\x1b[2J\nb")
    if config.data == "bug":
        raise RuntimeError("a bug of ours")
    if config.data == "hub":
        raise ConnectTimeout("timed out")
    if config.data == "memory":
        raise RuntimeError("alloc_cpu.cpp:127: can't allocate memory: you tried 9 bytes.")
    if config.data == "fails-at-7" and beta == 7:
        raise ValueError("seven does not work")
    if config.data == "ranks":
        rank = f"{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}"
        Path(f"rank-{beta:g}-{rank}").touch()
    if config.data == "slow":
        Path(f"started-{beta:g}-{os.getpid()}").touch()
        time.sleep(600)


main = entry("toy", Toy, "toy.stage:run", configs=str(Path(__file__).parents[1] / "conf"))
