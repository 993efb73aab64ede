"""A stage that does nothing, for tests of what all stages share."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import run_module

ROOT = Path(__file__).parents[2]
STAGE = ROOT / "tests/support/toy_stage.py"
CONFIG = """
defaults:
  - toy_schema
  - model: null
  - override hydra/launcher: process_group
  - override hydra/job_logging: stdout
  - _self_
hydra:
  job: {name: toy, chdir: false}
  run: {dir: .}
  sweep: {dir: "${runs}/toy"}
  output_subdir: null
"""
NOT_INHERITED = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")


class ToyCommand:
    """`python -m toy` in an empty folder.

    Attributes:
        folder: the folder.
        started: all processes that were started.
    """

    def __init__(self, folder):
        self.folder = folder
        self.started = []
        (folder / "toy").mkdir()
        (folder / "conf/model").mkdir(parents=True)
        # As the stages have it: what a cluster's job imports is no __main__.
        shutil.copyfile(STAGE, folder / "toy/stage.py")
        (folder / "toy/__main__.py").write_text("from toy.stage import main\n\nmain()\n")
        (folder / "conf/toy.yaml").write_text(CONFIG)
        (folder / "conf/model/small.yaml").write_text("base: org/small\n")

    def start(self, *arguments, **environment):
        """Start the command in a Python of its own; environment: variables to set."""
        process = subprocess.Popen(
            [sys.executable, "-m", "toy", *arguments],
            cwd=self.folder,
            env=_environment(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell starts background jobs with Ctrl-C ignored, and children inherit that: here
            # it must arrive.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.started.append(process)
        return process

    def __call__(self, *arguments, **environment):
        """Run the command to its end; what is returned has `returncode`, `out` and `err`."""
        return run_module("toy", arguments, self.folder, _environment(environment))


def _environment(own):
    """The variables of a command that nobody else has started.

    own: what it sets.
    """
    inherited = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
    return inherited | {"PYTHONPATH": str(ROOT)} | own


@pytest.fixture
def toy(tmp_path):
    """`toy(*arguments, **environment)` runs the toy stage; `toy.start` starts it."""
    command = ToyCommand(tmp_path)
    yield command
    for process in command.started:
        if process.poll() is None:  # the test failed; its children end with it
            process.terminate()
            process.communicate()
