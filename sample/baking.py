"""`python -m sample bake=<folder>`: one lambda written as plain weights, and how far what those sample is from mode exact."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deradiff.anchors.anchor import Anchor, load_anchor
from deradiff.data.prompts import Prompt
from deradiff.evaluation.statistics import paired_bootstrap
from deradiff.realignment.bake import NOTE, bake, write_note
from sample.config import SampleConfig
from sample.manifest import image_path
from sample.stage import sample_all


def bake_and_compare(
    config: SampleConfig, anchor: Anchor, prompts: list[Prompt], run_dir: Path, state: Any
) -> None:
    """Bake the one lambda of a resolved config, sample reference, mode exact, anchor, and what was written, and note the distances.

    The baked images come from the folder as it was written; they lie beside `run_dir`, in `<run_dir>-baked`.
    """
    (lam,), folder = config.lambdas, Path(str(config.bake))
    if state.is_main_process:
        bake(anchor, lam, folder, config.model.base, config.model.revision)
    state.wait_for_everyone()
    exact = replace(config, lambdas=sorted({0.0, lam, 1.0}), bake=None)
    sample_all(exact, anchor, prompts, run_dir, state)
    baked_dir = run_dir.with_name(f"{run_dir.name}-baked{lam:g}")
    baked = replace(exact, anchor=str(folder), lambdas=[1.0], path_kl=False)
    sample_all(baked, load_anchor(folder), prompts, baked_dir, state)
    if state.is_main_process:
        compared = compare(prompts, config.seeds, lam, run_dir, baked_dir)
        compared["settings"] = (
            f"{config.sampler}, {config.steps} steps, guidance {config.guidance_scale:g}"
        )
        write_note(folder, json.loads((folder / NOTE).read_text()) | {"compared": compared})
        value, low, high = compared["rms_from_exact"]
        share = compared["percent_of_distance"][0]
        print(
            f"sample: baked {folder}: RMS {value:.3g} [{low:.3g}, {high:.3g}] of 255 from mode exact, {share:.3g} % of reference to anchor"
        )
    state.wait_for_everyone()


def compare(
    prompts: list[Prompt], seeds: list[int], lam: float, run_dir: Path, baked_dir: Path
) -> dict[str, Any]:
    """RMS pixel distances on a scale of 0 to 255, each [value, low, high]: means over prompts, bootstrapped over them, paired by noise."""
    pairs = (("baked", "exact"), ("reference", "anchor"))
    rows = []
    for prompt in prompts:
        seen = []
        for seed in seeds:
            where = {
                name: run_dir / image_path(at, prompt.prompt_id, seed)
                for name, at in (("reference", 0.0), ("exact", lam), ("anchor", 1.0))
            }
            where["baked"] = baked_dir / image_path(1.0, prompt.prompt_id, seed)
            seen.append([_rms(where[one], where[other]) for one, other in pairs])
        rows.append(np.mean(seen, axis=0))
    values = np.array(rows)
    estimates = {
        "rms_from_exact": paired_bootstrap(values, lambda means: means[..., 0]),
        "rms_reference_anchor": paired_bootstrap(values, lambda means: means[..., 1]),
        "percent_of_distance": paired_bootstrap(
            values, lambda means: 100 * means[..., 0] / means[..., 1]
        ),
    }
    return {"prompts": len(prompts), "seeds": len(seeds)} | {
        name: list(asdict(e).values()) for name, e in estimates.items()
    }


def _rms(one: Path, other: Path) -> float:
    a, b = (np.asarray(Image.open(file).convert("RGB"), dtype=np.float64) for file in (one, other))
    return float(np.sqrt(np.square(a - b).mean()))
