"""What the base's small files say of a run, before its weights are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deradiff.files import locate
from deradiff.hub import fetch
from sample.config import SampleConfig

SCHEDULER = "scheduler/scheduler_config.json"


def base_json(config: SampleConfig, name: str) -> dict[str, Any]:
    """A json file of the base's folder or hub id. Raises ValueError where it cannot be read."""
    base = locate(str(config.model.base))
    try:
        file = (
            Path(base) / name if Path(base).is_dir() else fetch(base, name, config.model.revision)
        )
        return json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"{name} of {base} could not be read ({error})") from error


def check_ddim(config: SampleConfig) -> None:
    """ValueError where diffusers' DDIM would not step to its own next timestep.

    It steps to t - T // steps, T timesteps in training, wherever the next one of its spacing lies. What the chain draws then has another
    variance than its noise level: 6 to 49 % off for `trailing` at 300 and 400 steps.
    """
    assert config.steps  # `resolve` decided it
    published = base_json(config, SCHEDULER)
    spacing, trained = (
        published.get("timestep_spacing", "leading"),
        published.get("num_train_timesteps", 1000),
    )
    if (spacing == "trailing" and trained % config.steps) or (
        spacing == "linspace" and trained != config.steps
    ):
        divides = next(n for n in range(config.steps, 0, -1) if trained % n == 0)
        fewer = f"steps={divides}, which divides {trained}, or " if spacing == "trailing" else ""
        raise ValueError(
            f"sampler=ddim with {config.steps} steps and the timestep_spacing={spacing} of {config.model.base} misses its own next "
            f"timestep: give {fewer}sampler=euler"
        )
