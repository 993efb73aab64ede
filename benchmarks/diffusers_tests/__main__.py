"""`python -m benchmarks.diffusers_tests CHECKOUT`: the dial on diffusers' own pipeline tests.

diffusers' tests have dummy components for each of its pipelines: tiny random networks. Each image
and video pipeline of them is realigned with a full anchor and with a LoRA, and is compared with the
stock pipeline and with a mixture by hand (`checks.py` has what is asked). The checkout is one of
diffusers' repository, of the version that is installed:

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers
    pip install parameterized requests-mock sentencepiece torchsde opencv-python-headless
    python -m benchmarks.diffusers_tests diffusers

Nothing is loaded from the hub. Each case is a process of its own and a line of results.jsonl; the
same command goes on where it was stopped. The exit status is 1 where a case is wrong or crashes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from benchmarks.diffusers_tests import stand_ins
from benchmarks.diffusers_tests.cases import Case, find_cases
from benchmarks.diffusers_tests.checks import Checks
from benchmarks.diffusers_tests.outcomes import (
    CRASHED,
    NOT_BUILT,
    TIMED_OUT,
    WRONG_CASE,
    outcome_of,
    table,
)
from benchmarks.diffusers_tests.subject import Subject

RESULTS = "results.jsonl"
TABLE = "table.md"

PATIENCE = 20
"""A process that hangs is ended after so many times its seconds by the clock."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check every case, print and write the table; returns the exit status."""
    options = parse_arguments(arguments)
    be_quiet()
    stand_ins.install()
    cases = find_cases(options.checkout, options.only)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / RESULTS
    results = read_results(file)
    for case in cases:
        if case.name not in results:
            result = result_of(case, options.seconds)
            results[case.name] = result
            with open(file, "a") as lines:
                print(json.dumps(result), file=lines)
            print(f"{result['seconds']:6.1f} s  {case.name}: {result['outcome']}", flush=True)

    found = [results[case.name] for case in cases]
    text = table(found)
    print("\n" + text)
    (options.out / TABLE).write_text(text + "\n")
    return int(any(result["outcome"] in (WRONG_CASE, CRASHED) for result in found))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.diffusers_tests",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkout", type=Path, help="of diffusers' repository")
    parser.add_argument("--only", default="", help="a regular expression for the names of files")
    parser.add_argument(
        "--seconds", type=int, default=300, help="of one processor that a case may take"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/diffusers_tests"), help="folder of the results"
    )
    return parser.parse_args(arguments)


def be_quiet() -> None:
    """Have diffusers and transformers say nothing: tests warn on every page."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """The record of each case that has one already."""
    if not file.exists():
        return {}
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {record["case"]: record for record in records}


def result_of(case: Case, limit: int) -> dict[str, Any]:
    """The record of a case, from a process of its own.

    Args:
        case: the case.
        limit: seconds of the processor that it may take.
    """
    record: dict[str, Any] = {
        "case": case.name,
        "pipeline": case.pipeline,
        "kind": case.kind,
        "outcome": NOT_BUILT,
        "problem": case.problem,
        "checks": {},
        "seconds": 0.0,
    }
    if not case.problem:
        record |= _from_process(case, limit)
    return record


def _from_process(case: Case, limit: int) -> dict[str, Any]:
    """What a process finds out about a case."""
    # A fork has what this process imported, which takes longer than most cases.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_be_process, args=(case, limit, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(PATIENCE * limit):
            return receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode != -signal.SIGXCPU:
            return {"outcome": CRASHED, "problem": f"its process ended ({process.exitcode})"}
    finally:
        process.kill()
        process.join()
    problem = f"it takes more than {limit} s of a processor"
    return {"outcome": TIMED_OUT, "problem": problem, "seconds": float(limit)}


def _be_process(case: Case, limit: int, sender: Connection) -> None:
    """Be the process of a case."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    torch.set_num_threads(1)
    # diffusers' progress bars.
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stderr(nowhere),
        tempfile.TemporaryDirectory() as folder,
    ):
        record = _check(case, Path(folder))
    sender.send(record | {"seconds": round(time.process_time(), 1)})


def _check(case: Case, folder: Path) -> dict[str, Any]:
    """What the checks of a case answer."""
    try:
        subject = Subject(case.test_class)
        stock = subject.sample()
    except BaseException as error:
        text = " ".join(str(error).split())[:300]
        return {"outcome": NOT_BUILT, "problem": f"{type(error).__name__}: {text}"}
    checks = Checks(subject, stock, folder)
    checks.run()
    return {"outcome": outcome_of(checks.answers), "checks": checks.answers}


if __name__ == "__main__":
    sys.exit(main())
