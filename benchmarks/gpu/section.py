"""The process of one section: it does its checks in turn, and tells what it finds."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, CannotRun
from benchmarks.gpu.plan import EXPECTED_RATE, Check, Section, plan
from benchmarks.gpu.rows import CUT, FAILED, NOT_RUN, OK, Finding, Row
from benchmarks.gpu.sizes import SIZES

Tell = Callable[[dict[str, Any]], None]
"""Takes `{"started": check}` and `{"row": row}`."""


def run_checks(
    section: Section, bench: Bench, names: Sequence[str], deadline: float, tell: Tell
) -> None:
    """Do the checks of a section.

    Args:
        section: the section.
        bench: what its checks share.
        names: of the checks that are left to do.
        deadline: by `time.time`; a check that would pass it is cut.
        tell: is told when a check starts and what it found.
    """
    for check in section.checks:
        if check.name not in names:
            continue
        expected = check.seconds * slowness(bench)
        left = deadline - time.time()
        if expected > left:
            why = f"it takes some {expected:.0f} s, and {max(left, 0):.0f} s are left"
            row = Row(section.group, check.name, CUT, Finding(note=why))
        else:
            tell({"started": check.name})
            row = run_check(section.group, check, bench)
        tell({"row": asdict(row)})


def run_check(group: str, check: Check, bench: Bench) -> Row:
    """Do one check; whatever goes wrong is its row."""
    start = time.perf_counter()
    try:
        finding = check.run(bench)
        status = FAILED if finding.problem else OK
    except CannotRun as error:
        finding = Finding(note=str(error))
        status = NOT_RUN
    except Exception as error:
        finding = Finding(problem=f"{type(error).__name__}: {_first_line(error)}")
        status = FAILED
    row = Row(group, check.name, status, finding)

    # What the check held is given back before the next one counts its memory.
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return replace(row, took=time.perf_counter() - start)


def slowness(bench: Bench) -> float:
    """How many times as long as on an H100 a check may take here."""
    if bench.device.type == "cpu":
        return 1.0
    return max(1.0, EXPECTED_RATE / bench.card.rate)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]


def main() -> None:
    """Be the process of a section.

    The argument is a JSON object: the name of the section, and what a Bench is made from. The
    work begins when a line of standard input names the checks; so the imports are done by then.
    """
    told = json.loads(sys.argv[1])
    sections = {section.name: section for section in plan(SIZES[told["size"]])}
    section = sections[told["section"]]
    line = sys.stdin.readline()
    if not line:
        return
    order = json.loads(line)
    with open(told["events"], "w", buffering=1) as events:

        def tell(event: dict[str, Any]) -> None:
            print(json.dumps(event), file=events, flush=True)

        bench = Bench(section.group, told["device"], told["size"], Path(told["folder"]))
        run_checks(section, bench, order["names"], order["deadline"], tell)


if __name__ == "__main__":
    main()
