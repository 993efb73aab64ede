"""Faults by a seed in every stage, and a table of what became of them: `make test-faults`.

A fault befalls a command, and then the same command is typed again. It has survived where that
leaves the bytes of an undisturbed run, and is refused clearly where it is answered in one sentence.
Anything else is lost: other bytes, a traceback, a hang. `FAULTS_SEED` and `FAULTS_EACH` (faults of
a stage) are read from the environment.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter
from functools import partial

import pytest

from tests.support import faults
from tests.support.faults import Ended

SEED = int(os.environ.get("FAULTS_SEED", time.time_ns() % 10**6))
EACH = int(os.environ.get("FAULTS_EACH", 30))
OUTCOMES = ("survived", "refused clearly", "lost")


class Bench:
    """One stage: the files before its command, and what an undisturbed one leaves.

    Args:
        stage: the stage.
        work: the folder of all runs, as the stages before have left it.
    """

    def __init__(self, stage, work):
        self.stage = stage
        self.work = work
        self.before = work.with_name(f"before-{stage.name}")
        shutil.copytree(work, self.before)
        self.command = partial(stage.command, work)
        start = time.monotonic()
        self.writes = faults.count_writes(self.command, work)
        self.seconds = time.monotonic() - start
        self.expected = faults.results(stage, work)
        assert self.expected

    def reset(self):
        shutil.rmtree(self.work)
        shutil.copytree(self.before, self.work)

    def go(self, disturb=faults.nothing):
        return faults.run(self.command, disturb, self.work)

    def judge(self, first):
        """What became of a fault, and why, after the same command again."""
        if first.status == faults.TRACEBACK:
            return "lost", first.message
        second = self.go()
        if second.status == 0:
            found = faults.results(self.stage, self.work)
            names = found.keys() | self.expected.keys()
            other = [name for name in names if found.get(name) != self.expected.get(name)]
            left = faults.left_aside(self.work)
            return (
                ("lost", f"differ: {sorted(other)}, left: {left}")
                if other or left
                else (
                    "survived",
                    "",
                )
            )
        return ("refused clearly" if second.is_refusal else "lost"), second.message


# The kinds of faults


def killed_at_a_write(bench, rng):
    act = faults.kill_half_written(rng.random())
    return bench.go(faults.at_write(rng.randint(1, bench.writes), act))


def killed_at_a_moment(bench, rng):
    return bench.go(faults.kill_after(rng.uniform(0, bench.seconds)))


def interrupted(bench, rng):
    act = faults.send(rng.choice([signal.SIGINT, signal.SIGTERM]))
    return bench.go(faults.at_write(rng.randint(1, bench.writes), act))


def full_disk(bench, rng):
    """A disk that is full is one sentence, whenever that happens."""
    ended = bench.go(faults.at_write(rng.randint(1, bench.writes), faults.full_from_now))
    return ended if ended.is_refusal else Ended(faults.TRACEBACK, f"not refused: {ended}")


def small_disk(bench, rng):
    if not faults.can_mount():
        return full_disk(bench, rng)
    own = sum(file.stat().st_size for file in faults.files_of(bench.before))
    pages = sum(4096 for _ in bench.before.rglob("*"))
    with faults.small_disk(bench.work, own + pages + rng.randint(2**14, 2**20)):
        ended = bench.go()
    is_fine = ended.status == 0 or ended.is_refusal
    return ended if is_fine else Ended(faults.TRACEBACK, f"not refused: {ended}")


def spoilt_file(bench, rng):
    """A file is spoilt after a kill, or after the end."""
    if rng.random() < 0.5:
        killed_at_a_write(bench, rng)
    else:
        bench.go()
    what = rng.choice([faults.flip, faults.flip, faults.cut, faults.remove])
    what(rng.choice(read_again(bench)), rng)
    return Ended(0, "")


def read_again(bench):
    """The files that the product reads again; what it only writes is for people."""
    only_written = ("metrics.jsonl", "README.md", "grid.png", "report.html")
    files = []
    for file in faults.files_of(bench.work):
        is_for_people = file.name in only_written or file.parent.name in ("tables", "plots")
        if not is_for_people and file.parent.name != "panel":
            files.append(file)
    return files


def at_once(bench, rng):
    """A second command is refused, and harms nothing."""
    with faults.held_by_another(bench.work / bench.stage.run_dir):
        ended = bench.go()
    is_fine = ended.is_refusal and "is in use by process" in ended.message
    return ended if is_fine else Ended(faults.TRACEBACK, f"not refused: {ended}")


KINDS = {
    killed_at_a_write: 6,
    killed_at_a_moment: 3,
    interrupted: 4,
    full_disk: 3,
    small_disk: 2,
    spoilt_file: 11,
    at_once: 1,
}
"""How many of 30 faults are of a kind."""


@pytest.mark.slow
def test_no_fault_is_lost(base_folder, tmp_path_factory, capfd):
    folder = tmp_path_factory.mktemp("faults")
    work = folder / "work"
    work.mkdir()
    table = Counter()
    lost = []
    for stage in faults.stages(base_folder):
        bench = Bench(stage, work)
        done = work.with_name(f"done-{stage.name}")
        shutil.copytree(work, done)
        for number in range(EACH):
            rng = random.Random(f"{SEED}/{stage.name}/{number}")
            (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
            bench.reset()
            outcome, why = bench.judge(kind(bench, rng))
            table[stage.name, kind.__name__, outcome] += 1
            if outcome == "lost":
                lost.append(f"{stage.name} {number} {kind.__name__}: {why}")
                with capfd.disabled():
                    print(f"lost: {lost[-1]}", flush=True)
        # The next stage goes on where an undisturbed run of this one ended.
        shutil.rmtree(work)
        os.rename(done, work)
    with capfd.disabled():
        print(text_of(table), flush=True)
    assert not lost, "\n".join(lost)


def text_of(table):
    """The table as text."""
    lines = [
        "",
        f"faults by the seed {SEED}, {EACH} in each stage",
        f"| {'stage':<8} | {'fault':<20} | tried | survived | refused clearly | lost |",
        "|---|---|---|---|---|---|",
    ]
    rows = sorted({(stage, kind) for stage, kind, _ in table})
    for stage, kind in rows:
        counts = [table[stage, kind, outcome] for outcome in OUTCOMES]
        numbers = " | ".join(str(count) for count in [sum(counts), *counts])
        lines.append(f"| {stage:<8} | {kind.replace('_', ' '):<20} | {numbers} |")
    totals = []
    for outcome in OUTCOMES:
        totals.append(sum(count for key, count in table.items() if key[2] == outcome))
    lines.append(f"| all | | {' | '.join(str(count) for count in [sum(totals), *totals])} |")
    return "\n".join(lines)
