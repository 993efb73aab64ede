"""TensorBoard: event files in the run directory."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from configs.tracking import Tracker, TrackingConfig
from deradiff.image_files import read_image


class TensorBoardTracker(Tracker):
    """Numbers and images as event files in the run directory; TensorBoard has no artifacts.

    Args:
        writer: a `SummaryWriter`.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self.step = 0

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """Numbers of one step."""
        self.step = self.step if step is None else step
        for key, value in values.items():
            self.writer.add_scalar(key, value, self.step)

    def image(self, name: str, path: Path, caption: str = "") -> None:
        """One image file; svg files are not shown."""
        if path.suffix == ".svg":
            return
        pixels = np.asarray(read_image(path))
        self.writer.add_image(name, pixels, self.step, dataformats="HWC")


def start(
    tracking: TrackingConfig,
    stage: str,
    run_dir: Path,
    config: dict[str, Any],
    group: str,
    stack: ExitStack,
) -> Tracker:
    """Start a writer of event files; see `configs.tracking.Start` for the arguments."""
    # An optional package: only tracking.kind=tensorboard needs it.
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"))
    stack.callback(writer.close)

    # TensorBoard shows markdown, in which two spaces end a line.
    text = json.dumps(config, indent=1, default=str)
    writer.add_text("config", text.replace("\n", "  \n"))
    return TensorBoardTracker(writer)
