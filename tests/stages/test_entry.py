"""A stage's command line, as a user meets it: what is wrong in one sentence, exit status 2, no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

APP = """
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from configs.entry import entry

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
    def run_name(self):
        return self.name or f"beta{self.dpo.beta:g}"

def run(config, run_dir):
    print(f"beta {config.dpo.beta:g} base {config.model.base} in {run_dir}", flush=True)
    print(f"threads {os.environ.get('OMP_NUM_THREADS')} pid {os.getpid()}", flush=True)
    if config.data == "none":
        raise FileNotFoundError("there is no data")
    if config.data == "bug":
        raise RuntimeError("a bug of ours")
    if config.data == "fails-at-7" and config.dpo.beta == 7:
        raise ValueError("seven does not work")
    if config.data == "ranks":
        Path(f"rank-{config.dpo.beta:g}-{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}").touch()
    if config.data == "slow":
        Path(f"started-{config.dpo.beta:g}-{os.getpid()}").touch()
        time.sleep(600)

main = entry("toy", Toy, "toy.stage:run", configs=str(Path(__file__).parents[1] / "conf"))
"""
CONFIG = """
defaults:
  - toy_schema
  - model: null
  - override hydra/launcher: process_group
  - override hydra/job_logging: stdout
  - _self_
hydra: {job: {name: toy, chdir: false}, run: {dir: .}, sweep: {dir: "${runs}/toy"}, output_subdir: null}
"""


@pytest.fixture
def toy(tmp_path):
    """`toy(*arguments, **environment)` runs `python -m toy` in an empty folder; `toy.start` starts it."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "toy/stage.py").write_text(
        APP
    )  # as the stages have it: what a cluster's job imports is no __main__
    (tmp_path / "toy/__main__.py").write_text("from toy.stage import main\n\nmain()\n")
    (tmp_path / "conf/toy.yaml").write_text(CONFIG)
    (tmp_path / "conf/model/small.yaml").write_text("base: org/small\n")
    clean = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    }

    started = []

    def start(*arguments, **environment):
        process = subprocess.Popen(
            [sys.executable, "-m", "toy", *arguments],
            cwd=tmp_path,
            env=clean | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell starts background jobs with Ctrl-C ignored, and children inherit that: here it must arrive.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    def toy(*arguments, **environment):
        process = start(*arguments, **environment)
        process.out, process.err = process.communicate(timeout=300)
        return process

    toy.start, toy.folder = start, tmp_path
    yield toy
    for process in started:
        if process.poll() is None:  # the test failed; its children end with it
            process.terminate()
            process.communicate()


def test_a_good_command_runs_in_the_folder_that_the_config_names(toy):
    done = toy("data=x", "dpo.beta=500", "model=small")
    assert (done.returncode, done.err) == (0, "")
    assert "beta 500 base org/small in runs/toy/beta500" in done.out
    assert {p.name for p in toy.folder.iterdir()} == {"toy", "conf"}, (
        "Hydra leaves no log, outputs or .hydra folder"
    )


MISTAKES = {
    ("data=x", "dpo.bta=3"): "Key 'bta' not in 'DPO' (dpo.bta); did you mean dpo.beta?",
    ("data=x", "lambda=3"): "Key 'lambda' not in 'Toy' (lambda); did you mean lambdas?",
    ("data=x", "beta=3"): "Key 'beta' not in 'Toy' (beta); did you mean dpo.beta?",
    ("data=x", "lambdas=0.5"): "lambdas is a list: give lambdas=[0.5]",
    ("data=x", "+extra=3"): "Key 'extra' not in 'Toy' (extra)",
    (
        "data=x",
        "dpo.beta=many",
    ): "Value 'many' of type 'str' could not be converted to Float (dpo.beta)",
    (
        "data=x",
        "lambdas=[a]",
    ): "Value 'a' of type 'str' could not be converted to Float (lambdas[0])",
    ("data=x", "dpo.beta=-1"): "dpo.beta must be above 0, not -1.0",
    ("dpo.beta=3",): "data is missing: give data=...",
    ("data=x", "model=big"): "Could not find 'model/big'; there are small",
    ("data=x", "dpo.beta=1,2"): "put --multirun before the overrides",
    ("data=[x",): "cannot read data=[x",
    ("data=none",): "there is no data",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_sentence_on_stderr_and_status_2(toy, arguments):
    done = toy(*arguments)
    assert done.returncode == 2
    assert done.err.startswith("toy: ") and done.err.count("\n") == 1 and done.err.endswith("\n"), (
        done.err
    )
    assert MISTAKES[arguments] in done.err


def test_a_bug_keeps_its_traceback(toy):
    done = toy("data=bug")
    assert (
        done.returncode == 1
        and "Traceback" in done.err
        and done.err.endswith("RuntimeError: a bug of ours\n")
    )
    assert "hydra" not in done.err, "the traceback is of our own code"
