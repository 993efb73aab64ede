"""All sections, a process each, one after the other on the device; what hangs or dies is a row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import Check, Section
from benchmarks.gpu.rows import CUT, FAILED, Finding, Row

PATIENCE = 60.0
"""Seconds that a check may take beyond HANGING times what it is expected to."""

HANGING = 10.0

STARTING = 150.0
"""Seconds until a process has to have started its first check."""

POLL = 0.1
"""Seconds between two looks at what a process tells."""

Say = Callable[[Row], None]


class SectionProcess:
    """The process of a section. It imports at once, and works when it is told to.

    Args:
        section: the section.
        device: `cuda` or `cpu`.
        size: a key of SIZES.
        folder: for its log, and what it tells; its group has a folder in it.
    """

    def __init__(self, section: Section, device: str, size: str, folder: Path) -> None:
        name = section.name.replace(" ", "-")
        tries = len(list(folder.glob(f"{name}-*.log")))
        self.events = folder / f"{name}-{tries}.jsonl"
        self.log = folder / f"{name}-{tries}.log"
        group_folder = folder / section.group.replace(" ", "-")
        told = {
            "section": section.name,
            "device": device,
            "size": size,
            "folder": str(group_folder),
            "events": str(self.events),
        }
        # cuBLAS reads this when it starts; bits are compared with it.
        environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.section", json.dumps(told)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                start_new_session=True,
            )
        self._read = 0

    def go(self, names: Sequence[str], deadline: float) -> None:
        """Have it do these checks."""
        assert self.process.stdin is not None
        try:
            print(json.dumps({"names": list(names), "deadline": deadline}), file=self.process.stdin)
            self.process.stdin.close()
        except OSError:
            pass  # it has ended already, which `follow` notices

    def new_events(self) -> Iterator[dict[str, Any]]:
        """What it has told since the last time."""
        if not self.events.exists():
            return
        with open(self.events) as events:
            events.seek(self._read)
            while (line := events.readline()).endswith("\n"):
                self._read = events.tell()
                yield json.loads(line)

    def end(self) -> None:
        """End it, with the processes that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_words(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it said nothing"


def run_all(
    sections: Sequence[Section],
    device: str,
    size: str,
    folder: Path,
    deadline: float,
    say: Say,
) -> list[Row]:
    """Do all checks.

    Args:
        sections: in their order.
        device: `cuda` or `cpu`.
        size: a key of SIZES.
        folder: for logs, caches and runs.
        deadline: by `time.time`.
        say: is told each row as it is found.

    Returns:
        A row for each check of each section.
    """
    rows: list[Row] = []
    ready = [SectionProcess(sections[0], device, size, folder)]
    try:
        for section, following in zip(sections, [*sections[1:], None]):
            left = list(section.checks)
            while left:
                process = ready[0]
                process.go([check.name for check in left], deadline)
                # The next section imports meanwhile.
                if len(ready) == 1 and following is not None:
                    ready.append(SectionProcess(following, device, size, folder))
                rows += follow(process, section, left, deadline, say)
                ready.pop(0)
                # What is left after a check that ended its process is done by a new one.
                if left:
                    ready.insert(0, SectionProcess(section, device, size, folder))
    finally:
        for process in ready:
            process.end()
    return rows


def follow(
    process: SectionProcess, section: Section, left: list[Check], deadline: float, say: Say
) -> list[Row]:
    """Collect what a process finds until it ends; a check that it fails at is a row as well.

    Args:
        process: at work.
        section: that it works on.
        left: the checks that it was told to do; those that have a row are removed.
        deadline: by `time.time`.
        say: is told each row.
    """
    rows: list[Row] = []
    started: Check | None = None
    since = time.time()

    def end_with(row: Row) -> None:
        rows.append(row)
        left[:] = [check for check in left if check.name != row.check]
        say(row)

    while left:
        # What it tells, once it is known whether it can tell more.
        has_ended = process.process.poll() is not None
        for event in process.new_events():
            since = time.time()
            started = None
            if "row" in event:
                end_with(Row.of(event["row"]))
            else:
                started = next(check for check in left if check.name == event["started"])
        if not left:
            break

        # What is wrong with it.
        status, why = _verdict(process, has_ended, started, since, deadline)
        if why:
            process.end()
            is_over = status == CUT
            blamed = left if is_over or started is None else [started]
            for check in list(blamed):
                took = time.time() - since if check is started else 0.0
                found = Finding(note=why) if is_over else Finding(problem=why)
                end_with(Row(section.group, check.name, status, found, took))
            break
        time.sleep(POLL)
    process.end()
    return rows


def _verdict(
    process: SectionProcess,
    has_ended: bool,
    started: Check | None,
    since: float,
    deadline: float,
) -> tuple[str, str]:
    """How the checks that are left end now, and why; "" where the process works on."""
    now = time.time()
    if has_ended:
        code = process.process.returncode
        return FAILED, f"its process ended with status {code}: {process.last_words()}"
    if now > deadline:
        return CUT, "it was not done when the time was over"
    if started is None:
        limit = STARTING
        text = f"its process started no check in {limit:.0f} s"
    else:
        limit = PATIENCE + HANGING * started.seconds
        text = f"it did not end in {limit:.0f} s; {started.seconds:.0f} were expected"
    return FAILED, text if now - since > limit else ""
