"""Where a stage's numbers and images go besides its run directory: W&B, TensorBoard, or nowhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configs.settings import setting

KINDS = ("wandb", "tensorboard", "none")
MODES = ("online", "offline")

LARGEST_ARTIFACT = 1_000_000_000
"""Bytes. A full SDXL is ten times that, for every beta."""

LONGEST_NAME = 128
"""Characters that W&B takes for a group or an id."""


@dataclass
class TrackingConfig:
    """Where a run is tracked."""

    kind: str = setting("wandb", "wandb, tensorboard or none")
    mode: str | None = setting(None, "of W&B: online or offline; null: online where a key is set")
    project: str = setting("deradiff", "the W&B project")
    group: str = setting(
        "", "runs of one experiment, linked in W&B; empty: those of one base model"
    )

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"tracking must be wandb, tensorboard or none, not {self.kind!r}")
        if self.mode not in (None, *MODES):
            raise ValueError(
                f"tracking.mode must be online or offline, not {self.mode!r}; tracking=none turns "
                "tracking off"
            )
        if self.kind == "tensorboard" and find_spec("tensorboard") is None:
            raise ValueError(
                "tracking=tensorboard needs a package that is not installed: type pip install "
                "tensorboard"
            )


class Tracker:
    """A tracker that tracks nothing; also the interface, so no stage asks whether it is tracked."""

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """Numbers of one step."""

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table; a cell that is a `Path` to an image is shown as the image."""

    def image(self, name: str, path: Path, caption: str = "") -> None:
        """One image file: png, or svg shown as html."""

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """A folder or file as a versioned artifact."""

    def uses(self, name: str, kind: str) -> None:
        """The artifact of an earlier stage that this run starts from."""


class WandbTracker(Tracker):
    """A Weights & Biases run.

    Args:
        run: the run.
        wandb: the package, which is imported only where it is used.
    """

    def __init__(self, run: Any, wandb: Any) -> None:
        self.run = run
        self.wandb = wandb

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """Numbers of one step."""
        self.run.log(values, step=step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table with its images."""
        cells = [[self._cell(cell) for cell in row] for row in rows]
        self.run.log({name: self.wandb.Table(columns=[*columns], data=cells)})

    def _cell(self, cell: Any) -> Any:
        return self.wandb.Image(str(cell)) if isinstance(cell, Path) else cell

    def image(self, name: str, path: Path, caption: str = "") -> None:
        """One image file."""
        if path.suffix == ".svg":
            panel = self.wandb.Html(path.read_text())
        else:
            panel = self.wandb.Image(str(path), caption=caption or None)
        self.run.log({name: panel})

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """A folder or file, unless it is too large to upload."""
        files = path.rglob("*") if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
        if size > LARGEST_ARTIFACT:
            print(
                f"W&B: {path} is not uploaded as an artifact: it has {size / 1e9:.1f} GB",
                file=sys.stderr,
            )
            return
        artifact = self.wandb.Artifact(name, type=kind)
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def uses(self, name: str, kind: str) -> None:
        """The artifact as an input of this run."""
        inputs = sorted({*self.run.config.get("inputs", []), name})
        self.run.config.update({"inputs": inputs}, allow_val_change=True)
        # W&B can link runs only where it can look the other one up
        if not self.run.offline:
            self.run.use_artifact(f"{name}:latest", type=kind)


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
        """One image file; svg files are left out."""
        if path.suffix == ".svg":
            return
        # Loaded here, so that a config does not load them
        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.open(path).convert("RGB"))
        self.writer.add_image(name, pixels, self.step, dataformats="HWC")


class GuardedTracker(Tracker):
    """A tracker whose failures are said, each kind once, and do not stop the run.

    The run's own files hold everything that is tracked.

    Args:
        tracker: the tracker.
        stage: for the message.
    """

    def __init__(self, tracker: Tracker, stage: str) -> None:
        self.tracker = tracker
        self.stage = stage
        self._failed: set[str] = set()

    def _try(self, method: str, *arguments: Any) -> None:
        try:
            getattr(self.tracker, method)(*arguments)
        except Exception as error:  # whatever a tracker raises
            if method not in self._failed:
                print(
                    f"{self.stage}: the tracker failed ({method}: {error}); going on without it",
                    file=sys.stderr,
                )
            self._failed.add(method)

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """Numbers of one step."""
        self._try("log", values, step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table."""
        self._try("table", name, columns, rows)

    def image(self, name: str, path: Path, caption: str = "") -> None:
        """One image file."""
        self._try("image", name, path, caption)

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """A folder or file."""
        self._try("artifact", name, kind, path)

    def uses(self, name: str, kind: str) -> None:
        """An artifact of an earlier stage."""
        self._try("uses", name, kind)


@contextmanager
def tracker(
    tracking: TrackingConfig,
    stage: str,
    run_dir: Path,
    config: dict[str, Any],
    main_process: bool = True,
    group: str = "",
) -> Iterator[Tracker]:
    """The stage's tracker, while the context lasts.

    W&B writes offline where no key is set. A tracker that cannot start, or fails on the way, is
    named, and the run goes on without it.

    Args:
        tracking: which one.
        stage: the stage's name.
        run_dir: of the run.
        config: nested settings, for the tracker's own record.
        main_process: other processes are not tracked.
        group: of the run, where the config names none.
    """
    if tracking.kind == "none" or not main_process:
        yield Tracker()
        return
    with ExitStack() as stack:
        start = _start_wandb if tracking.kind == "wandb" else _start_tensorboard
        try:
            started: Tracker = start(tracking, stage, run_dir, config, group, stack)
        except Exception as error:
            print(
                f"{stage}: the tracker {tracking.kind} did not start ({error}); going on without it",
                file=sys.stderr,
            )
            started = Tracker()
        yield GuardedTracker(started, stage)


def _start_wandb(
    tracking: TrackingConfig,
    stage: str,
    run_dir: Path,
    config: dict[str, Any],
    group: str,
    stack: ExitStack,
) -> Tracker:
    import wandb

    has_key = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
    mode: Any = tracking.mode or (None if has_key else "offline")
    run = wandb.init(
        project=tracking.project,
        group=(tracking.group or group)[:LONGEST_NAME] or None,
        job_type=stage,
        name=run_dir.name,
        id=f"{stage}-{run_dir.name}"[:LONGEST_NAME],
        dir=str(run_dir),
        config=config,
        mode=mode,
        resume="allow",
        settings=wandb.Settings(silent=True),
    )
    return WandbTracker(stack.enter_context(run), wandb)


def _start_tensorboard(
    tracking: TrackingConfig,
    stage: str,
    run_dir: Path,
    config: dict[str, Any],
    group: str,
    stack: ExitStack,
) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"))
    stack.callback(writer.close)
    text = json.dumps(config, indent=1, default=str)
    writer.add_text("config", text.replace("\n", "  \n"))
    return TensorBoardTracker(writer)
