"""`python -m sample bake=<folder>`: one lambda as plain weights, compared with mode exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deradiff.anchors.anchor import load_anchor
from deradiff.data.prompts import Prompt
from deradiff.evaluation.statistics import paired_bootstrap
from deradiff.image_files import read_image
from deradiff.realignment.bake import bake, read_note, write_note
from deradiff.terminal import say
from sample.manifest import image_path
from sample.sweep import Sweep


def bake_and_compare(sweep: Sweep) -> None:
    """Bake the one lambda of a run, sample with it, and note how far it is from mode exact.

    Reference, mode exact and anchor are sampled into the run directory. The baked images come from
    the folder as it was written, and are saved in `<run_dir>-baked<lam>`.
    """
    config = sweep.config
    state = sweep.state
    (lam,) = config.lambdas
    (anchor,) = sweep.anchors
    folder = Path(str(config.bake))
    if state.is_main_process:
        bake(anchor, lam, folder, sweep.base.source, sweep.base.revision)
    state.wait_for_everyone()

    # Reference, mode exact, anchor
    exact = replace(config, lambdas=sorted({0.0, lam, 1.0}), bake=None)
    Sweep(exact, sweep.base, sweep.anchors, sweep.prompts, sweep.run_dir, state).run()

    # What was written, which is an anchor of its own
    baked_dir = sweep.run_dir.with_name(f"{sweep.run_dir.name}-baked{lam:g}")
    baked = replace(exact, anchor=str(folder), lambdas=[1.0], path_kl=False)
    Sweep(baked, sweep.base, [load_anchor(folder)], sweep.prompts, baked_dir, state).run()

    if state.is_main_process:
        _note_comparison(sweep, folder, baked_dir)
    state.wait_for_everyone()


def _note_comparison(sweep: Sweep, folder: Path, baked_dir: Path) -> None:
    """Write the distances into the baked folder, and print them."""
    config = sweep.config
    (lam,) = config.lambdas
    compared = compare(sweep.prompts, config.seeds, lam, sweep.run_dir, baked_dir)
    compared["settings"] = (
        f"{config.sampler}, {config.steps} steps, guidance {config.guidance_scale:g}"
    )
    write_note(folder, read_note(folder) | {"compared": compared})
    value, low, high = compared["rms_from_exact"]
    percent = compared["percent_of_distance"][0]
    say(
        f"sample: baked {folder}: RMS {value:.3g} [{low:.3g}, {high:.3g}] of 255 from mode exact, "
        f"{percent:.3g} % of reference to anchor"
    )


def compare(
    prompts: Sequence[Prompt], seeds: Sequence[int], lam: float, run_dir: Path, baked_dir: Path
) -> dict[str, Any]:
    """RMS distances between images, on a scale of 0 to 255.

    Means over prompts, bootstrapped over them, paired by noise.

    Returns:
        How many prompts and seeds, and [value, low, high] of each distance.
    """
    rows = []
    for prompt in prompts:
        distances = [_distances(prompt, seed, lam, run_dir, baked_dir) for seed in seeds]
        rows.append(np.mean(distances, axis=0))
    values = np.array(rows)  # (prompts, 2): baked to exact, reference to anchor

    def from_exact(means: NDArray[np.float64]) -> NDArray[np.float64]:
        return means[..., 0]

    def reference_to_anchor(means: NDArray[np.float64]) -> NDArray[np.float64]:
        return means[..., 1]

    def percent(means: NDArray[np.float64]) -> NDArray[np.float64]:
        return 100 * means[..., 0] / means[..., 1]

    compared: dict[str, Any] = {"prompts": len(prompts), "seeds": len(seeds)}
    statistics = {
        "rms_from_exact": from_exact,
        "rms_reference_anchor": reference_to_anchor,
        "percent_of_distance": percent,
    }
    for name, statistic in statistics.items():
        estimate = paired_bootstrap(values, statistic)
        compared[name] = list(asdict(estimate).values())
    return compared


def _distances(
    prompt: Prompt, seed: int, lam: float, run_dir: Path, baked_dir: Path
) -> tuple[float, float]:
    """Baked to exact, and reference to anchor, of one prompt and seed."""

    def image(folder: Path, image_lam: float) -> Path:
        return folder / image_path((image_lam,), prompt.prompt_id, seed)

    baked_to_exact = _rms(image(baked_dir, 1.0), image(run_dir, lam))
    reference_to_anchor = _rms(image(run_dir, 0.0), image(run_dir, 1.0))
    return baked_to_exact, reference_to_anchor


def _rms(one: Path, other: Path) -> float:
    pixels = []
    for file in (one, other):
        pixels.append(np.asarray(read_image(file), dtype=np.float64))
    return float(np.sqrt(np.square(pixels[0] - pixels[1]).mean()))
