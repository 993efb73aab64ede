"""Which images of a run are sampled together.

In another batch the same image differs by rounding. So a run writes down its batches: what an
interruption or a damaged file has cost is sampled again in the batch that it was in, to the same
bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from deradiff.data.prompts import Prompt
from deradiff.digests import sealed, unsealed
from deradiff.files import write_atomic
from deradiff.terminal import warn
from sample.sampling import PromptSeed

FILE = ".batches.json"

Batch = list[PromptSeed]


def wanted_images(prompts: Sequence[Prompt], seeds: Sequence[int]) -> Batch:
    """The prompts and seeds of a run, in its order."""
    wanted = []
    for prompt in prompts:
        wanted += [PromptSeed(prompt, seed) for seed in seeds]
    return wanted


def plan(
    run_dir: Path,
    wanted: Sequence[PromptSeed],
    is_missing: Callable[[PromptSeed], bool],
    limit: int,
    processes: int,
) -> None:
    """Write down the batches of images that are missing and in no batch yet.

    Args:
        run_dir: the run directory.
        wanted: what this command samples.
        is_missing: whether an image is missing at some lambda.
        limit: of the images in a batch. Larger ones, of an earlier command, are given up.
        processes: that will share the batches.
    """
    batches = [batch for batch in _read(run_dir) if len(batch) <= limit]
    planned = set()
    for batch in batches:
        planned |= set(batch)
    new = [one.name for one in wanted if one.name not in planned and is_missing(one)]

    # Every process has a batch, where there are images enough.
    size = max(1, min(limit, math.ceil(len(new) / processes)))
    for start in range(0, len(new), size):
        batches.append(new[start : start + size])
    write_atomic(run_dir / FILE, json.dumps(sealed({"batches": batches})))


def batches_to_sample(
    run_dir: Path, wanted: Sequence[PromptSeed], is_missing: Callable[[PromptSeed], bool]
) -> list[Batch]:
    """The batches in which something is missing.

    Args:
        run_dir: the run directory.
        wanted: what this command samples. Images of a batch that are not among them are left out.
        is_missing: whether an image is missing at some lambda.
    """
    by_name = {one.name: one for one in wanted}
    batches = []
    for names in _read(run_dir):
        batch = [by_name[name] for name in names if name in by_name]
        if any(map(is_missing, batch)):
            batches.append(batch)
    return batches


def _read(run_dir: Path) -> list[list[str]]:
    """The batches that are written down, as names; those of a damaged file are made anew."""
    file = run_dir / FILE
    try:
        return list(unsealed(json.loads(file.read_text()))["batches"])
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        warn(f"sample: {file} is written again: {error}")
        return []
