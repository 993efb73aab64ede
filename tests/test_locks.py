"""Work that processes share, and runs that they do not."""

import errno
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from deradiff import locks as locks_module
from deradiff.locks import RUN_LOCK, Locks, run_lock
from tests.support.sampled_runs import evaluate, write_run
from tests.support.train_runs import go

OTHER_PROCESS = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from deradiff.locks import Locks

with Locks(Path(sys.argv[2])) as locks:
    for number in locks.share([0, 1, 2]):
        print(number, flush=True)
        time.sleep(60)
"""


def test_processes_share_numbered_work_and_a_killed_one_leaves_no_lock(tmp_path):
    root = str(Path(__file__).parents[1])
    file = tmp_path / "lock"
    command = [sys.executable, "-c", OTHER_PROCESS, root, str(file)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "0\n", "it works on 0, and holds its lock"
    with Locks(file) as locks:
        shared = locks.share([0, 1, 2])
        assert [next(shared), next(shared)] == [1, 2], "what nobody works on comes first"
        other.kill()
        assert list(shared) == [0]
    other.wait()


OWNER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from deradiff.locks import run_lock

with run_lock(Path(sys.argv[2])):
    print("locked", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_owner(run_dir):
    """A process that holds the lock of a run directory while the context lasts."""
    command = [sys.executable, "-c", OWNER, str(Path(__file__).parents[1]), str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def test_a_run_directory_is_for_one_command_at_a_time(tmp_path):
    with another_owner(tmp_path) as owner:
        message = f"is in use by process {owner.pid} on {socket.gethostname()}: wait"
        with pytest.raises(ValueError, match=message), run_lock(tmp_path):
            pass
        # Other ranks of a run leave the lock to the main process.
        with run_lock(tmp_path, is_main_process=False):
            pass

        # What a killed process leaves behind is taken over.
        owner.kill()
        owner.wait()
        assert f"process {owner.pid}" in (tmp_path / RUN_LOCK).read_text()
        with run_lock(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / RUN_LOCK).read_text()
    assert (tmp_path / RUN_LOCK).read_text() == ""


def test_without_locks_in_the_file_system_a_living_process_is_respected(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks_module.fcntl, "lockf", no_locks)
    host = socket.gethostname()
    (tmp_path / RUN_LOCK).write_text(f"process {os.getppid()} on {host}\n")
    with pytest.raises(ValueError, match=f"in use by process {os.getppid()}"), run_lock(tmp_path):
        pass
    for gone in (f"process {2**22 + 1} on {host}\n", "process 1 on elsewhere\n", "\0\xff"):
        (tmp_path / RUN_LOCK).write_text(gone)
        with run_lock(tmp_path):
            pass


def test_stages_keep_out_of_a_run_that_another_command_works_on(train_config, tmp_path):
    run_dir = tmp_path / "train" / train_config.run_name()
    with another_owner(run_dir), pytest.raises(ValueError, match=f"{run_dir} is in use by"):
        go(train_config)
    assert not (run_dir / "config.yaml").exists()

    samples = write_run(tmp_path, beta=2000)
    run_dir = tmp_path / "eval/mine"
    with another_owner(run_dir), pytest.raises(ValueError, match=f"{run_dir} is in use by"):
        evaluate(tmp_path, [samples], name="mine")
    assert not (run_dir / "config.yaml").exists()
