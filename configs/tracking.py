"""Where a stage's numbers and pictures go besides its run directory: Weights & Biases, or nowhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST_ARTIFACT = 1_000_000_000  # bytes; a full SDXL is ten times that, for every beta


@dataclass
class TrackingConfig:
    """kind: `wandb` or `none`. project: the W&B project. group: runs of one experiment, linked in W&B's view; empty: the project's."""

    kind: str = "wandb"
    project: str = "deradiff"
    group: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("wandb", "none"):
            raise ValueError(f"tracking must be wandb or none, not {self.kind!r}")


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


class WandbTracker(Tracker):
    def __init__(self, run: Any) -> None:
        import wandb

        self.run, self.wandb = run, wandb

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.run.log(values, step=step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        shown = [[self.wandb.Image(str(c)) if isinstance(c, Path) else c for c in row] for row in rows]
        self.run.log({name: self.wandb.Table(columns=[*columns], data=shown)})

    def image(self, name: str, path: Path, caption: str = "") -> None:
        shown = self.wandb.Html(path.read_text()) if path.suffix == ".svg" else self.wandb.Image(str(path), caption=caption or None)
        self.run.log({name: shown})

    def artifact(self, name: str, kind: str, path: Path) -> None:
        size = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
        if size > LARGEST_ARTIFACT:
            print(f"W&B: {path} is not uploaded as an artifact: it has {size / 1e9:.1f} GB", file=sys.stderr)
            return
        artifact = self.wandb.Artifact(name, type=kind)
        (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
        self.run.log_artifact(artifact)


@contextmanager
def tracker(tracking: TrackingConfig, stage: str, run_dir: Path, config: dict[str, Any], main_process: bool = True) -> Iterator[Tracker]:
    """The stage's tracker. W&B writes offline where no key is set; a tracker that cannot start is named and the run goes on without it."""
    if tracking.kind == "none" or not main_process:
        yield Tracker()
        return
    import wandb

    try:
        keyed = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
        run = wandb.init(
            project=tracking.project, group=tracking.group or None, job_type=stage, name=run_dir.name, id=f"{stage}-{run_dir.name}"[:128],
            dir=str(run_dir), config=config, mode=None if keyed else "offline", resume="allow", settings=wandb.Settings(silent=True),
        )  # fmt: skip
    except Exception as error:  # whatever W&B raises, the run's own files hold everything that it would have got
        print(f"{stage}: W&B did not start ({error}); going on without it", file=sys.stderr)
        yield Tracker()
        return
    with run:
        yield WandbTracker(run)
