"""What a run leaves: the trained model, an anchor's card and README, uploads."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import cast

import accelerate
import diffusers
import peft
import torch
import transformers

from configs.tracking import Tracker
from deradiff.anchors.anchor import BETA_CONVENTION, AnchorCard, load_anchor
from deradiff.anchors.model_card import GRID, write_model_card
from deradiff.digests import sealed, unsealed
from deradiff.files import write_atomic
from deradiff.hub import push
from deradiff.image_files import is_whole_png
from deradiff.models.base_model import BaseModel
from deradiff.terminal import say, warn
from deradiff.text_files import read_json
from deradiff.training.checkpoints import Progress
from deradiff.training.objectives.base import AnchorObjective, Objective
from train.config import TrainConfig
from train.data import describe_data, reward_of

BEGUN = "begun.json"
FINISHED = "finished.json"
LIBRARIES = (torch, diffusers, transformers, peft, accelerate)


def make_card(config: TrainConfig, base: BaseModel, device: str) -> AnchorCard:
    """The anchor's card, without the cost of the run, which is not known yet.

    Args:
        config: of the run.
        base: its base model.
        device: number and name of the devices.
    """
    return AnchorCard(
        base_model=base.source,
        base_revision=base.revision,
        vae=base.vae,
        family=base.family.name,
        method=config.finetune.method,
        beta=config.beta,
        beta_convention=BETA_CONVENTION,
        objective=" + ".join([config.objective, *getattr(config.settings, "additions", [])]),
        steps=config.steps,
        pairs_seen=config.steps * config.optim.pairs_per_step,
        dataset=describe_data(config.data),
        reward=reward_of(config.data),
        seed=config.seed,
        git_commit=git_commit(),
        versions=versions(),
        device=device,
    )


def versions() -> dict[str, str]:
    """What is installed, so that a result can be explained later."""
    found = {library.__name__: library.__version__ for library in LIBRARIES}
    return found | {"python": platform.python_version()}


def git_commit() -> str | None:
    """The commit of the checkout that runs, or None outside one."""
    root = Path(__file__).parents[1]
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except OSError:  # git is not installed
        return None

    # A checkout of something else around an installed deradiff does not count.
    top, _, commit = answer.stdout.strip().partition("\n")
    return commit if commit and Path(top) == root else None


def training_summary(config: TrainConfig, learning_rate: float) -> dict[str, object]:
    """What the README of an anchor says of its training, besides the card."""
    optim = config.optim
    rate = f"{learning_rate:.4g} ({optim.rule}), {optim.decay} after {optim.warmup} steps"
    summary: dict[str, object] = {
        "pairs per step": f"{optim.pairs_per_step}, in batches of {optim.batch_size}",
        "learning rate": rate,
        "optimiser": f"{optim.name}, weight decay {optim.weight_decay:g}, clip {optim.clip:g}",
        "precision": config.precision,
        "resolution": config.model.resolution,
        "caption dropout": config.data.caption_dropout,
    }
    if config.finetune.method == "lora":
        summary["LoRA"] = f"rank {config.finetune.rank}, alpha {config.finetune.alpha}"
    return summary


def flops_of_step(objective: AnchorObjective, config: TrainConfig, run_dir: Path) -> float:
    """FLOPs of one optimiser step, as the run has begun.

    They are written down by its first command. A later one finds reference errors in the store that
    the first has computed, and would count too little.
    """
    file = run_dir / BEGUN
    try:
        return float(unsealed(read_json(file))["flops_of_step"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        warn(f"train: {file} is written again: {error}")
    pairs = config.optim.pairs_per_step
    flops = objective.step_flops(pairs, config.model.gradient_checkpointing)
    write_atomic(file, json.dumps(sealed({"flops_of_step": flops})))
    return flops


def add_cost(
    objective: AnchorObjective, config: TrainConfig, step_flops: float, progress: Progress
) -> None:
    """Write the cost of a finished run into the card of its objective."""
    objective.card = replace(
        objective.card,
        gpu_hours=progress.device_seconds / 3600,
        flops=config.steps * step_flops,
    )


def finished_folder(config: TrainConfig, run_dir: Path) -> Path | None:
    """The folder of the trained model if the run is finished and the model whole; else None.

    An anchor that is not what was written is named on stderr: it is made again, from the last
    checkpoint.
    """
    folder = run_dir / config.spec.folder
    try:
        is_marked = unsealed(read_json(run_dir / FINISHED))["folder"] == folder.name
    except (FileNotFoundError, ValueError, KeyError):
        is_marked = False
    if not is_marked or not folder.is_dir():
        return None
    if config.spec.makes_anchor:
        try:
            load_anchor(folder).check_weights()
        except ValueError as error:
            warn(f"train: {error}; it is made again")
            return None
    return folder


def finish(
    objective: Objective,
    config: TrainConfig,
    run_dir: Path,
    track: Tracker,
    summary: dict[str, object],
) -> Path:
    """Save the trained model, and mark the run as finished.

    An anchor also gets a README, and the last panel.

    Returns:
        The folder of the trained model.
    """
    # The model.
    folder = run_dir / config.spec.folder
    objective.save(folder)
    name = run_dir.name

    # What makes an anchor's folder a repository.
    if config.spec.makes_anchor:
        panels = sorted(filter(is_whole_png, (run_dir / "panel").glob("step-*.png")))
        if panels:
            write_atomic(folder / GRID, panels[-1].read_bytes())
        card = cast(AnchorObjective, objective).card
        write_model_card(folder, card, summary, config.hub.push_to)
        name = f"anchor-{name}"

    # Only now is the run finished: until then the same command does all of this again.
    track.artifact(name, "model", folder)
    write_atomic(run_dir / FINISHED, json.dumps(sealed({"folder": folder.name})))
    return folder


def upload(config: TrainConfig, folder: Path) -> None:
    """Upload the anchor, where `hub.push_to` asks for it."""
    if config.hub.push_to:
        say(f"train: uploaded to {push(folder, config.hub.push_to)}")
