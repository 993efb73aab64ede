"""`deradiff train | sample | eval | ...`: the commands, wherever deradiff is installed.

`deradiff train key=value` is `python -m train key=value` of a checkout. In a wheel the stages lie
in `deradiff/commands/`; this module puts that folder on the path of its own process and of the
processes that it starts, and of no other.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import deradiff
from deradiff.terminal import say, warn

STAGES = {
    "train": "align a model at one beta: an anchor",
    "sample": "sample an anchor, realigned over a list of lambdas",
    "eval": "score samples, and write tables, figures and a report",
    "calibrate": "what an anchor is, from pairs that it was not trained on",
    "needs": "what a training needs on 1 to 64 GPUs: hours, memory, disk and cost; nothing is run",
}
MODULES = {"calibrate": "sample.calibrate", "needs": "train.needs"}
"""Where a command is, if not in a package of its name."""

PACKAGE = Path(__file__).parent


def commands_folder() -> Path:
    """The folder that holds the stages: `deradiff/commands` in a wheel, the checkout otherwise."""
    installed = PACKAGE / "commands"
    return installed if installed.is_dir() else PACKAGE.parent


def command_of(stage: str) -> str:
    """How a command is typed: `deradiff train` in a wheel, `python -m train` in a checkout.

    Args:
        stage: a key of `STAGES`.
    """
    if commands_folder().parent == PACKAGE:
        return f"deradiff {stage}"
    return f"python -m deradiff {stage}" if stage in MODULES else f"python -m {stage}"


def usage() -> str:
    """What `deradiff --help` prints."""
    lines = ["deradiff <command> key=value ...", "", "commands:"]
    for stage, meaning in STAGES.items():
        lines.append(f"  {stage:<10}{meaning}")
    lines += ["", "deradiff <command> --help lists the keys of one; deradiff --version"]
    return "\n".join(lines)


def main() -> None:
    """Run the stage that the first argument names, with the arguments that follow it.

    An unknown command ends the process with a sentence and status 2.
    """
    # What is no stage.
    arguments = sys.argv[1:]
    command = arguments[0] if arguments else "--help"
    if command in ("--help", "-h"):
        say(*usage().split("\n"))
        return
    if command == "--version":
        say(f"deradiff {deradiff.__version__}")
        return
    if command not in STAGES:
        known = ", ".join(STAGES)
        warn(f"deradiff: there is no command {command!r}; the commands are {known}")
        sys.exit(2)

    run_stage(command, arguments[1:])


def run_stage(stage: str, arguments: list[str]) -> None:
    """Run a stage in this process, as `python -m <stage> <arguments>` does.

    Args:
        stage: a key of `STAGES`.
        arguments: what follows the stage's name on the command line.
    """
    folder = str(commands_folder())
    inherited = os.environ.get("PYTHONPATH")
    paths = [folder, inherited] if inherited else [folder]

    # Launchers start `python -m <stage>` in processes of their own: these look there as well.
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    sys.path.insert(0, folder)
    sys.argv = [f"deradiff {stage}", *arguments]
    runpy.run_module(MODULES.get(stage, stage), run_name="__main__", alter_sys=False)
