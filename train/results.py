"""What a run leaves for others: pictures on the way, the trained folder, its README, its upload."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from configs.tracking import Tracker
from deradiff.anchors.anchor import load_anchor, save_anchor
from deradiff.anchors.model_card import GRID, write_model_card
from deradiff.files import write_atomic
from deradiff.hub import push
from deradiff.training.panel import sample_panel
from train.config import TrainConfig

if TYPE_CHECKING:
    from deradiff.anchors.anchor import AnchorCard

FINISHED = "finished.json"
PROMPTS = 4  # of the data's captions, where the config gives none


def finished(run_dir: Path) -> Path | None:
    """The folder of a run that trained to its end and saved what it trained; None for any other."""
    file = run_dir / FINISHED
    folder = run_dir / json.loads(file.read_text())["folder"] if file.is_file() else None
    return folder if folder and folder.is_dir() else None


def finish(
    objective: Any, config: TrainConfig, run_dir: Path, track: Tracker, recipe: dict[str, object]
) -> Path:
    """Save what was trained, with its README and last picture where it is an anchor, and mark the run as finished."""
    folder = objective.save(run_dir)
    if config.objective == "dpo":
        pictures = sorted((run_dir / "panel").glob("step-*.png"))
        if pictures:
            shutil.copyfile(pictures[-1], folder / GRID)
        write_model_card(folder, objective.card, recipe, config.hub.push_to)
    track.artifact(
        f"anchor-{run_dir.name}" if config.objective == "dpo" else run_dir.name, "model", folder
    )
    write_atomic(run_dir / FINISHED, json.dumps({"folder": folder.name}))
    return folder


def upload(config: TrainConfig, folder: Path) -> None:
    if config.hub.push_to:
        print(f"train: uploaded to {push(folder, config.hub.push_to)}", flush=True)


class Panels:
    """Every so many steps, fixed prompts at several lambdas: run_dir/panel/step-000500.png.

    Sampled by a pipeline of its own with the anchor as it is saved, so that nothing of it touches training. A picture that fails does
    not stop the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        card: AnchorCard | None,
        captions: Sequence[str],
        track: Tracker,
        device: Any,
    ):
        self.config, self.folder, self.card, self.track, self.device = (
            config,
            run_dir / "panel",
            card,
            track,
            device,
        )
        self.prompts = list(config.panel.prompts) or list(dict.fromkeys(captions))[:PROMPTS]

    def __call__(self, network: nn.Module, step: int) -> None:
        file = self.folder / f"step-{step:06d}.png"
        if self.card is None or file.is_file():
            return
        try:
            self._draw(network, file)
            self.track.image("panel", file, f"step {step}")
        except Exception as error:  # a picture: not worth a week's run
            print(f"train: no picture at step {step}: {error}", file=sys.stderr, flush=True)

    def _draw(self, network: nn.Module, file: Path) -> None:
        from train.pipelines import frozen_pipeline

        assert self.card
        anchor, panel = self.folder / "anchor", self.config.panel
        save_anchor(anchor, network, replace(self.card))
        pipe = frozen_pipeline(self.config).to(self.device)
        image = sample_panel(
            pipe,
            load_anchor(anchor),
            self.prompts,
            panel.lambdas,
            resolution=self.config.model.resolution,
            steps=panel.steps,
            guidance_scale=panel.guidance_scale,
        )
        image.save(file)
        shutil.rmtree(anchor)
        del pipe
        torch.cuda.empty_cache()
