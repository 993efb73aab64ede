"""Ctrl-C while a command is imported."""

import ast
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ("train.__main__", "sample.__main__", "eval.__main__", "train.needs", "sample.calibrate")

CODE = """
from configs import ctrl_c
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""


def test_it_ends_the_process_with_a_sentence():
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == 130
    assert done.stderr == "interrupted before the command began\n"


def test_where_it_is_ignored_it_stays_ignored():
    code = CODE.replace("time.sleep(60)", "print('goes on')")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert done.stdout == "goes on\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_ready_for_it_before_its_imports_and_hands_it_over_after_them(command):
    file = ROOT / f"{command.replace('.', os.sep)}.py"
    imports = [
        node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert ast.unparse(imports[0]) == "from configs import ctrl_c"
    # Tests that a shell starts in the background ignore Ctrl-C from the beginning.
    before = signal.getsignal(signal.SIGINT)
    importlib.import_module(command)
    assert signal.getsignal(signal.SIGINT) is before
