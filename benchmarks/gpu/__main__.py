"""`python -m benchmarks.gpu`: every check that needs a GPU, in eight minutes, as one table.

Random weights at the published sizes of SD1.5 and SDXL; nothing is downloaded. The exit status is 0
where no check failed, 1 where one did, and 2 where there is no GPU.

python -m benchmarks.gpu                              on a machine with a GPU: `make gpu`
python -m benchmarks.gpu --device cpu --size tiny     the same checks, to see that they run
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import FLAGS
from benchmarks.gpu.counts import count, estimate_rows
from benchmarks.gpu.plan import LEFT_OUT, LIMIT, plan
from benchmarks.gpu.rows import FAILED, Row, markdown, records
from benchmarks.gpu.run import run_all
from benchmarks.gpu.sizes import SIZES

NO_GPU = 2
"""The exit status where there is no GPU."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check everything, print and write the table; returns the exit status."""
    start = time.time()
    options = parse_arguments(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu: torch {torch.__version__} finds no CUDA device on this machine, so nothing was "
            "checked: run `make gpu` where there is one, or see the checks run on this CPU with "
            "python -m benchmarks.gpu --device cpu --size tiny",
            file=sys.stderr,
        )
        return NO_GPU
    sections = plan(SIZES[options.size])
    if options.only:
        sections = [section for section in sections if section.name in options.only]

    # The networks are counted while the device works.
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as counter:
        counting = counter.submit(count, SIZES[options.size])
        deadline = start + 60 * options.minutes
        rows = run_all(sections, options.device, options.size, Path(folder), deadline, _say)
        counts = counting.result()
    rows += estimate_rows(rows, counts, is_gpu=options.device == "cuda")
    found = records(rows, counts.costs)
    text = report(found, time.time() - start)
    print("\n" + text)

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(text + "\n")
    (options.out / "table.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"\ngpu: the table is in {options.out}, as table.md and table.json")
    return int(any(row.status == FAILED for row in rows))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=tuple(SIZES), default="real")
    parser.add_argument(
        "--minutes", type=float, default=LIMIT / 60, help="a check that would end later is cut"
    )
    names = [section.name for section in plan(SIZES["real"])]
    parser.add_argument("--only", choices=names, action="append", help="these sections alone")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the table")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and options.size == "real":
        parser.error("a CPU needs days for the published sizes: give --size tiny")
    return options


def report(found: Sequence[Mapping[str, Any]], seconds: float) -> str:
    """The table, with what it was measured on and what is not in it."""
    lines = [f"# GPU checks, {seconds:.0f} s", ""]
    for record in found:
        card = record["finding"]["card"]
        if card:
            gigabytes = card["memory"] / 1e9
            lines.append(
                f"- {record['group']}: {card['name']}, {gigabytes:.0f} GB, "
                f"{card['rate'] / 1e12:.3g} TFLOP/s of bf16 products measured"
            )
    lines += [
        f"- torch {torch.__version__}, CUDA {torch.version.cuda}",
        f"- Bits are compared on one card, with {FLAGS}.",
        "- MFU: FLOPs of the denoiser (of the autoencoder, for the cache) without what is repeated "
        "to save memory, over the measured products; of peak: over the card's data sheet.",
        "- x: the time beside that of the plain pipeline, or of the published way to train.",
        *(f"- Not in the plan: {text}." for text in LEFT_OUT),
        "",
        markdown(found),
    ]
    counted = _counted([record["status"] for record in found])
    return "\n".join([*lines, "", counted])


def _counted(statuses: Sequence[str]) -> str:
    """How many rows have each status."""
    counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
    return ", ".join(f"{number} {status}" for status, number in counts.items())


def _say(row: Row) -> None:
    """Tell a row as soon as it is found."""
    finding = row.finding
    seconds = f", {finding.seconds:.3g} s ({finding.unit})" if finding.seconds else ""
    why = f": {row.why}" if row.why else ""
    print(f"gpu: {row.group}, {row.check}: {row.status}{seconds}{why}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
