"""Ranks come together before they work, and a lost one ends the others with status 75."""

import os
import signal
import socket
import sys
import time

import pytest
import torch
import torch.distributed as dist

from deradiff.training import ranks as ranks_module
from deradiff.training.preemption import Listening, RanksLost
from deradiff.training.ranks import Ranks, Watch, gather_ranks, is_lost_connection
from tests.support.processes import LOCALHOST, start

REQUEUE = 75
SECONDS = 60


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind((LOCALHOST, 0))
        return free.getsockname()[1]


def environment(rank, count, port):
    """What a launcher tells a rank."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    return {name: str(value) for name, value in told.items()} | {"MASTER_ADDR": LOCALHOST}


def launch(works, tmp_path):
    """Run a function for each rank in a process of its own; returns process ids.

    Each writes what it says to `<rank>.log`.
    """
    port = free_port()
    processes = []
    for rank, work in enumerate(works):

        def run(rank=rank, work=work):
            os.environ.update(environment(rank, len(works), port))
            file = os.open(tmp_path / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
            sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
            work()

        processes.append(start(run))
    return processes


def status_of(process):
    """The exit status of a process that has to end soon."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return "it hung"


def working(timeout=4.0, then=lambda: None):
    """What a rank does: it comes, and waits for the others in a collective again and again."""

    def work():
        with Watch(gather_ranks("cpu", timeout), "train", lambda: "step 7 is the last checkpoint"):
            for _ in range(400):
                then()
                dist.all_reduce(torch.ones(1))
                time.sleep(0.05)

    def main():
        try:
            work()
        except RanksLost as lost:
            print(lost, flush=True)
            os._exit(REQUEUE)

    return main


def wait_for(file, word, seconds=SECONDS):
    """Wait until a log holds a word."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if file.exists() and word in file.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{word} never came")


def say_ready():
    print("ready", flush=True)


@pytest.mark.parametrize("signal_number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_falls_silent_ends_the_other_with_its_name(tmp_path, signal_number):
    first, second = launch([working(then=say_ready)] * 2, tmp_path)
    wait_for(tmp_path / "0.log", "ready")
    os.kill(second, signal_number)
    assert status_of(first) == REQUEUE
    os.kill(second, signal.SIGKILL)
    os.waitpid(second, 0)
    told = (tmp_path / "0.log").read_text()
    assert "rank 1 (" in told
    assert "step 7 is the last checkpoint, and the same command resumes" in told


def test_a_rank_that_fails_tells_the_others_why(tmp_path):
    def fail():
        time.sleep(1)
        raise MemoryError("no memory for pair 3")

    first, second = launch([working(then=say_ready), working(then=fail)], tmp_path)
    assert status_of(first) == REQUEUE
    assert status_of(second) == 1
    assert "has ended (MemoryError: no memory for pair 3)" in (tmp_path / "0.log").read_text()


def test_a_rank_that_never_comes_is_named():
    port = free_port()

    def alone():
        os.environ.update(environment(0, 3, port))
        with pytest.raises(RanksLost, match="of 3 ranks, rank 1, 2 did not come within 1 s"):
            gather_ranks("cpu", 1.0)

    assert status_of(start(alone)) == 0


def test_a_rank_without_rank_0_says_where_it_looked():
    port = free_port()

    def alone():
        os.environ.update(environment(1, 2, port))
        with pytest.raises(RanksLost, match=f"rank 1 does not reach rank 0 at 127.0.0.1:{port}"):
            gather_ranks("cpu", 1.0)

    assert status_of(start(alone)) == 0


def test_ranks_on_other_kinds_of_devices_are_refused(tmp_path):
    def on(device):
        def work():
            with pytest.raises(ValueError, match=r"rank \d \(.*\) computes on"):
                gather_ranks(device, 5.0)

        return work

    processes = launch([on("cpu"), on("cuda")], tmp_path)
    assert [status_of(process) for process in processes] == [0, 0]


def test_a_signal_that_came_while_a_rank_waits_shortens_its_patience(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks_module, "HURRY", 3.0)
    waiting = working(timeout=60.0, then=say_ready)

    def listening():
        with Listening():
            waiting()

    first, second = launch([listening] * 2, tmp_path)
    wait_for(tmp_path / "0.log", "ready")
    os.kill(second, signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(first, signal.SIGTERM)
    assert status_of(first) == REQUEUE
    os.kill(second, signal.SIGKILL)
    os.waitpid(second, 0)
    assert "rank 1 (" in (tmp_path / "0.log").read_text()


def test_one_rank_has_nobody_to_watch():
    assert gather_ranks("cpu", 1.0).store is None
    with Watch(Ranks(None, 0, 1, 1.0), "train", lambda: ""):
        pass


def test_only_a_lost_connection_is_taken_for_one():
    assert is_lost_connection(RuntimeError("[enforce fail] gloo: Connection closed by peer"))
    assert not is_lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
