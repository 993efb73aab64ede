"""Where a stage's numbers and pictures go besides its run directory: Weights & Biases, TensorBoard, or nowhere."""

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

LARGEST_ARTIFACT = 1_000_000_000  # bytes; a full SDXL is ten times that, for every beta


@dataclass
class TrackingConfig:
    """kind: `wandb`, `tensorboard` or `none`. mode: W&B's, `online` or `offline`; null: online with a key. project: the W&B project.

    group: runs of one experiment, linked in W&B's view; empty: those of one base model.
    """

    kind: str = "wandb"
    mode: str | None = None
    project: str = "deradiff"
    group: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("wandb", "tensorboard", "none"):
            raise ValueError(f"tracking must be wandb, tensorboard or none, not {self.kind!r}")
        if self.mode not in (None, "online", "offline"):
            raise ValueError(
                f"tracking.mode must be online or offline, not {self.mode!r}; tracking=none turns tracking off"
            )
        if self.kind == "tensorboard" and find_spec("tensorboard") is None:
            raise ValueError(
                "tracking=tensorboard needs a package that is not installed: type pip install tensorboard"
            )


class Tracker:
    """A tracker that tracks nothing; also the interface, so that a stage never asks whether it is tracked."""

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """Numbers of one step."""

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table; a cell that is a `Path` to a picture is shown as the picture."""

    def image(self, name: str, path: Path, caption: str = "") -> None:
        """One picture file (png, or svg shown as html)."""

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """A folder or file as a versioned artifact."""

    def uses(self, name: str, kind: str) -> None:
        """The artifact of an earlier stage that this run starts from."""


class WandbTracker(Tracker):
    def __init__(self, run: Any) -> None:
        import wandb

        self.run, self.wandb = run, wandb

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.run.log(values, step=step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        shown = [
            [self.wandb.Image(str(c)) if isinstance(c, Path) else c for c in row] for row in rows
        ]
        self.run.log({name: self.wandb.Table(columns=[*columns], data=shown)})

    def image(self, name: str, path: Path, caption: str = "") -> None:
        shown = (
            self.wandb.Html(path.read_text())
            if path.suffix == ".svg"
            else self.wandb.Image(str(path), caption=caption or None)
        )
        self.run.log({name: shown})

    def artifact(self, name: str, kind: str, path: Path) -> None:
        size = (
            sum(file.stat().st_size for file in path.rglob("*"))
            if path.is_dir()
            else path.stat().st_size
        )
        if size > LARGEST_ARTIFACT:
            print(
                f"W&B: {path} is not uploaded as an artifact: it has {size / 1e9:.1f} GB",
                file=sys.stderr,
            )
            return
        artifact = self.wandb.Artifact(name, type=kind)
        (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
        self.run.log_artifact(artifact)

    def uses(self, name: str, kind: str) -> None:
        self.run.config.update(
            {"inputs": sorted({*self.run.config.get("inputs", []), name})}, allow_val_change=True
        )
        if not self.run.offline:  # W&B can link runs only where it can look the other one up
            self.run.use_artifact(f"{name}:latest", type=kind)


class TensorBoardTracker(Tracker):
    """Numbers and pictures as event files in the run directory; TensorBoard has no artifacts."""

    def __init__(self, writer: Any) -> None:
        self.writer, self.step = writer, 0

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.step = self.step if step is None else step
        for key, value in values.items():
            self.writer.add_scalar(key, value, self.step)

    def image(self, name: str, path: Path, caption: str = "") -> None:
        if path.suffix != ".svg":
            import numpy as np
            from PIL import Image

            self.writer.add_image(
                name, np.asarray(Image.open(path).convert("RGB")), self.step, dataformats="HWC"
            )


class Guarded(Tracker):
    """A tracker whose failures are told, each kind once, and do not stop the run: its own files hold everything that is tracked."""

    def __init__(self, tracker: Tracker, stage: str) -> None:
        self.tracker, self.stage, self.told = tracker, stage, set[str]()

    def _try(self, method: str, *arguments: Any) -> None:
        try:
            getattr(self.tracker, method)(*arguments)
        except Exception as error:  # whatever a tracker raises
            if method not in self.told:
                print(
                    f"{self.stage}: the tracker failed ({method}: {error}); going on without it",
                    file=sys.stderr,
                )
            self.told.add(method)

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self._try("log", values, step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        self._try("table", name, columns, rows)

    def image(self, name: str, path: Path, caption: str = "") -> None:
        self._try("image", name, path, caption)

    def artifact(self, name: str, kind: str, path: Path) -> None:
        self._try("artifact", name, kind, path)

    def uses(self, name: str, kind: str) -> None:
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
    """The stage's tracker. group: where the config names none. W&B writes offline where no key is set; a tracker that cannot start or
    fails on the way is named and the run goes on without it."""
    if tracking.kind == "none" or not main_process:
        yield Tracker()
        return
    with ExitStack() as stack:
        try:
            start = _wandb if tracking.kind == "wandb" else _tensorboard
            started: Tracker = start(tracking, stage, run_dir, config, group, stack)
        except Exception as error:
            print(
                f"{stage}: the tracker {tracking.kind} did not start ({error}); going on without it",
                file=sys.stderr,
            )
            started = Tracker()
        yield Guarded(started, stage)


def _wandb(
    tracking: TrackingConfig,
    stage: str,
    run_dir: Path,
    config: dict[str, Any],
    group: str,
    stack: ExitStack,
) -> Tracker:
    import wandb

    keyed = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
    mode: Any = tracking.mode or (None if keyed else "offline")
    run = wandb.init(
        project=tracking.project,
        group=(tracking.group or group)[:128] or None,
        job_type=stage,
        name=run_dir.name,
        id=f"{stage}-{run_dir.name}"[:128],
        dir=str(run_dir),
        config=config,
        mode=mode,
        resume="allow",
        settings=wandb.Settings(silent=True),
    )
    return WandbTracker(stack.enter_context(run))


def _tensorboard(
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
    writer.add_text("config", json.dumps(config, indent=1, default=str).replace("\n", "  \n"))
    return TensorBoardTracker(writer)
