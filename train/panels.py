"""Panels of a run on its way: what the anchor in training looks like."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from configs.tracking import Tracker
from deradiff.anchors.anchor import Anchor, AnchorCard, load_anchor, save_anchor
from deradiff.files import write_atomic
from deradiff.image_files import is_whole_png
from deradiff.image_tables import encode_png
from deradiff.models.base_model import BaseModel
from deradiff.terminal import warn
from deradiff.training.lending import is_lendable, lent_reference
from deradiff.training.panel import Row, encode_prompts, sample_panel
from train.build import encoding_pipeline, frozen_dtype
from train.config import TrainConfig

PROMPTS = 4
"""Prompts of a panel, from the captions of the data, where the config gives none."""

TEXT_ENCODERS = ("text_encoder", "image_encoder")
"""Beginnings of the names of the components that a panel does without."""


class Panels:
    """Draws the panels of a run: fixed prompts at several lambdas, `panel/step-000500.png`.

    They are sampled with the anchor as it would be saved. A LoRA's reference is the network in
    training, lent to the panel's pipeline; a full anchor's is loaded for each panel. Training is
    not touched, and a panel that fails does not stop the run.

    Args:
        config: of the run.
        base: its base model.
        run_dir: its directory.
        card: of the anchor; None: the run makes none, and has no panels.
        captions: of the data; the first ones are the prompts if the config gives none.
        track: gets every panel.
        device: on which they are sampled.
    """

    def __init__(
        self,
        config: TrainConfig,
        base: BaseModel | None,
        run_dir: Path,
        card: AnchorCard | None,
        captions: Sequence[str],
        track: Tracker,
        device: torch.device,
    ) -> None:
        self.config = config
        self.base = base
        self.folder = run_dir / "panel"
        self.card = card
        self.track = track
        self.device = device
        self.prompts = list(config.panel.prompts)
        if not self.prompts:
            distinct = list(dict.fromkeys(captions))
            self.prompts = distinct[:PROMPTS]
        # The prompts as the pipeline takes them, which are encoded once.
        self._rows: list[Row] = []

    def __call__(self, network: nn.Module, step: int) -> None:
        """Draw the panel of a step, unless it is there and whole."""
        file = self.folder / f"step-{step:06d}.png"
        if self.card is None or is_whole_png(file):
            return
        try:
            self._draw(network, self.card, file)
            self.track.image("panel", file, f"step {step}")
        except Exception as error:  # an image is not worth a week's run
            warn(f"train: no panel at step {step}: {error}")

    def _draw(self, network: nn.Module, card: AnchorCard, file: Path) -> None:
        anchor = self.folder / ".anchor.part"
        try:
            # The anchor as it would be saved.
            save_anchor(anchor, network, replace(card))
            with ExitStack() as stack:
                lent = None
                if is_lendable(network):
                    lent = stack.enter_context(lent_reference(network))
                sheet = self._sample(lent, load_anchor(anchor))
            write_atomic(file, encode_png(sheet))
        finally:
            shutil.rmtree(anchor, ignore_errors=True)
            # Training needs the memory.
            torch.cuda.empty_cache()

    def _sample(self, denoiser: nn.Module | None, anchor: Anchor) -> Image.Image:
        """The sheet.

        Args:
            denoiser: the reference's network; None: it is loaded.
            anchor: the anchor.
        """
        base = self.base
        assert base is not None
        panel = self.config.panel
        guidance = panel.guidance_scale
        if guidance is None:
            guidance = base.family.sampling.guidance_scale

        # The prompts, by a pipeline that is gone when the next one is loaded.
        if not self._rows:
            encoding = encoding_pipeline(self.config, base, self.device)
            self._rows = encode_prompts(encoding, self.prompts, guidance)
            del encoding

        parts: dict[str, Any] = {
            name: None for name in base.index if name.startswith(TEXT_ENCODERS)
        }
        if denoiser is not None:
            parts[base.family.denoiser] = denoiser
        pipe = base.load_pipeline(frozen_dtype(self.config), parts).to(self.device)
        return sample_panel(
            pipe,
            anchor,
            self.prompts,
            self._rows,
            panel.lambdas,
            resolution=self.config.model.resolution,
            steps=panel.steps,
            guidance_scale=guidance,
        )
