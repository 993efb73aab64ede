"""`deradiff calibrate`: how strongly anchors came out, by pairs that they were not trained on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from configs.tracking import Tracker, tracker
from deradiff.anchors.anchor import Anchor, read_card, write_card
from deradiff.anchors.model_card import write_calibration
from deradiff.calibration.calibrate import TABLE_BETAS, TABLE_LAMS, Calibration, calibrate
from deradiff.calibration.figure import loss_over_lambda
from deradiff.calibration.table import loss_table
from deradiff.data.pairs import Pairs
from deradiff.digests import sealed
from deradiff.evaluation.figures.drawing import drawing_of
from deradiff.files import slug, write_atomic
from deradiff.locks import run_lock
from deradiff.models.base_model import BaseModel
from deradiff.run_directories import claim
from deradiff.terminal import say
from deradiff.worlds import shapes
from sample.calibrate_config import CalibrateConfig
from sample.resolve import SHAPES_ASSETS, base_for, find_anchor

HALF_WIDTH = 5.0
"""The relative half-width of beta_eff's interval, times the root of the number of pairs.

Measured on the shapes world: 3.5 to 6."""

SHAPES_SEED = 1_000_000
"""Of new pairs of the shapes world: no training draws its pairs from so large a seed."""


def run(config: CalibrateConfig, run_dir: Path) -> Path:
    """Calibrate anchors, and leave the table, the figure and the cards.

    Args:
        config: of the run.
        run_dir: where these go.

    Returns:
        The run directory.

    Raises:
        ValueError: for a mistake in the config, before a weight is loaded.
    """
    anchors = [find_anchor(anchor, config.read_pickled_tensors) for anchor in config.anchors]
    base = base_for(config.model, anchors)
    if config.pairs is None and not base.source.startswith(SHAPES_ASSETS):
        raise ValueError(
            "there are no new pairs of this base to be had: give pairs=<pairs that the anchor was "
            "not trained on>"
        )
    with run_lock(run_dir, True):
        claim(run_dir, asdict(config), ("runs", "name", "tracking", "on_card"))
        data = _pairs(config, run_dir)
        say(*_announcement(config, base, anchors, data))
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        half = "bfloat16" if base.family.flow else "float16"
        dtype = config.dtype or ("float32" if device.type == "cpu" else half)
        found = calibrate(
            base.load_pipeline(getattr(torch, dtype)).to(device),
            anchors,
            data,
            count=config.count,
            draws=config.draws,
            batch_size=config.batch_size,
            resolution=config.model.resolution,
            seed=config.seed,
        )
        group = slug(base.source)
        with tracker(config.tracking, "calibrate", run_dir, asdict(config), True, group) as track:
            _write(config, run_dir, found, track)
        if config.on_card:
            _write_cards(anchors, found, config)
        say(*(f"calibrate: {verdict}" for verdict in found.verdicts))
        say(f"calibrate: see {run_dir}")
    return run_dir


def _pairs(config: CalibrateConfig, run_dir: Path) -> Pairs:
    """The held-out pairs; those of the shapes world are drawn once."""
    if config.pairs is not None:
        return Pairs(config.pairs, config.split)
    name = f"pairs-{config.reward}-{config.count}-{config.seed}.parquet"
    file = run_dir / name
    if not file.exists():
        part = run_dir / f".{name}.part"
        shapes.write_pairs(part, config.count, SHAPES_SEED + config.seed, config.reward)
        part.rename(file)
    return Pairs(str(file))


def _announcement(
    config: CalibrateConfig, base: BaseModel, anchors: Sequence[Anchor], data: Pairs
) -> list[str]:
    """What is asked, what it costs, and how precise it will be."""
    pairs = min(config.count, len(data))
    evaluations = 2 * pairs * config.draws
    half_width = HALF_WIDTH / math.sqrt(pairs)
    enough = math.ceil((HALF_WIDTH / 0.2) ** 2)
    names = " and ".join(anchor.source for anchor in anchors)
    return [
        f"calibrate: {names} against {base.source}, on {pairs} pairs of {data.path}",
        f"calibrate: {pairs} pairs x 2 images x {config.draws} draws: {evaluations:,} evaluations "
        f"of each of {len(anchors) + 1} networks",
        f"calibrate: beta_eff will be known to about {half_width:.0%}; {enough} pairs give 20 %, "
        "where the anchors are like those of the shapes world",
    ]


def _write(config: CalibrateConfig, run_dir: Path, found: Calibration, track: Tracker) -> None:
    """Write the table, the figure and what a program reads, and track them."""
    betas = config.betas or TABLE_BETAS
    table = loss_table(found, config.lams or TABLE_LAMS, betas)
    table.write(run_dir)
    drawing = drawing_of(
        loss_over_lambda(found, betas),
        "Held-out loss over lambda",
        "For each anchor, the loss of Diffusion-DPO on held-out pairs over lambda, a line for each "
        "beta, with the lambda of the lowest loss marked",
    )
    for ending, content in drawing.files.items():
        write_atomic(run_dir / f"held_out_loss.{ending}", content)
    results = {anchor.name: anchor.numbers for anchor in found.anchors}
    write_atomic(run_dir / "calibration.json", json.dumps(sealed(results), indent=2) + "\n")

    track.table("calibration", list(table.data.columns), table.data.to_numpy().tolist())
    track.image("held_out_loss", run_dir / "held_out_loss.svg")
    for number, anchor in enumerate(found.anchors):
        track.log({f"{name}/{number}": value for name, value in anchor.numbers.items()})


def _write_cards(anchors: Sequence[Anchor], found: Calibration, config: CalibrateConfig) -> None:
    """Write the results onto the cards of anchors that are folders of this machine."""
    for anchor, result in zip(anchors, found.anchors):
        folder = Path(anchor.root)
        card = read_card(folder) if folder.is_dir() else None
        if card is None or not anchor.weights:
            continue
        write_card(folder, replace(card, calibration=result.numbers), folder / anchor.weights)
        on_pairs = f"On {int(result.numbers['pairs'])} pairs that it was not trained on"
        write_calibration(folder, f"{on_pairs}: {_without_name(result)}")


def _without_name(result: Any) -> str:
    """The verdict of an anchor, about which a README is anyway."""
    return result.verdict.replace(f"{result.name}, ", "this anchor, ", 1)
