"""Processes that begin as this one stands: what is imported needs not be imported again."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed import TCPStore

LOCALHOST = "127.0.0.1"


def start(work: Callable[[], object]) -> int:
    """Fork a process that does some work; returns its id.

    Args:
        work: what the process does.
    """
    process = os.fork()
    if process:
        return process
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def succeeds(work: Callable[[], object]) -> bool:
    """Whether a process of its own does some work without an error, which is on stderr.

    Args:
        work: what the process does.
    """
    _, status = os.waitpid(start(work), 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


class Ended(NamedTuple):
    """A process that has ended.

    Attributes:
        returncode: its exit status.
        out: what it wrote to stdout.
        err: what it wrote to stderr.
    """

    returncode: int
    out: str
    err: str


def run_module(
    name: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> Ended:
    """Run `python -m <name> <arguments>` to its end.

    Args:
        name: of the module.
        arguments: of its command line.
        folder: where it runs.
        environment: all of its variables.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:

        def work() -> None:
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            _write_to(out.fileno(), err.fileno())
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = [name, *arguments]
            sys.path.insert(0, str(folder))
            status = _status_of_module(name)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

        _, status = os.waitpid(start(work), 0)
        out.seek(0)
        err.seek(0)
        return Ended(os.waitstatus_to_exitcode(status), out.read(), err.read())


def _write_to(out: int, err: int) -> None:
    """Have this process write to two other files in place of stdout and stderr."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w")


def _status_of_module(name: str) -> int:
    """Run a module as the interpreter does; returns the exit status."""
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def on_ranks(work: Callable[[], object], count: int = 2, seconds: float = 120) -> None:
    """Do some work on CPU ranks of one process group, as torchrun starts them.

    Args:
        work: what each rank does.
        count: how many ranks there are.
        seconds: how long they may take.

    Raises:
        AssertionError: where a rank fails, which says why on stderr, or takes longer.
    """
    # The ranks meet at this process, as at torchrun's: nobody can take the port before them.
    store = TCPStore(LOCALHOST, 0, is_master=True, wait_for_workers=False)
    group = {
        "MASTER_ADDR": LOCALHOST,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
    }

    def rank_work(rank: int) -> None:
        os.environ |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        AcceleratorState._reset_state(reset_partial_state=True)
        work()
        # In order: a rank that ends alone may abort one that still has a connection to it.
        Accelerator(cpu=True).end_training()

    ranks = []
    for rank in range(count):
        ranks.append(start(partial(rank_work, rank)))
    assert _all_succeed(ranks, seconds)


def _all_succeed(processes: list[int], seconds: float) -> bool:
    """Wait for processes. Where one fails or is not done in time, end those that are left."""
    deadline = time.monotonic() + seconds
    status = 0
    while processes and not status and time.monotonic() < deadline:
        time.sleep(0.01)
        for process in list(processes):
            ended, its_status = os.waitpid(process, os.WNOHANG)
            if ended:
                processes.remove(process)
                status = status or its_status
    for process in processes:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return not status and not processes
