"""Work that processes share."""

import subprocess
import sys
from pathlib import Path

from deradiff.data.locks import Locks

OTHER_PROCESS = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from deradiff.data.locks import Locks

with Locks(Path(sys.argv[2])) as locks:
    for number in locks.share([0, 1, 2]):
        print(number, flush=True)
        time.sleep(60)
"""


def test_processes_share_numbered_work_and_a_killed_one_leaves_no_lock(tmp_path):
    root = str(Path(__file__).parents[2])
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
