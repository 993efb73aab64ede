"""Weights & Biases. W&B writes offline where no key is set."""

from __future__ import annotations

import os
import re
import uuid
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import wandb

from configs.tracking import ABANDONED, Tracker, TrackingConfig
from deradiff.files import write_atomic
from deradiff.terminal import say, warn
from deradiff.text_files import read_text

LARGEST_ARTIFACT = 1_000_000_000
"""Bytes. A full SDXL has ten times as many."""

ID_FILE = "wandb_id.txt"
"""The file of a run directory that keeps its id in W&B."""

FINISH_SECONDS = 300.0
"""Time that W&B has, when a stage ends, to upload what is left."""

LONGEST_NAME = 128
"""Characters that W&B takes for a group, an id or an artifact's name."""

NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
"""What W&B takes in no artifact's name, whatever a folder is called."""


class WandbTracker(Tracker):
    """A Weights & Biases run.

    Args:
        run: the run.
    """

    def __init__(self, run: Any) -> None:
        self.run = run
        # The numbers whose axis W&B has been told.
        self._axes: set[str] = set()

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """Numbers of one step."""
        self.run.log(values, step=step)

    def curve(self, over: str, point: dict[str, float]) -> None:
        """Numbers that W&B plots over an axis of their own."""
        for name in point:
            if name != over and name not in self._axes:
                self.run.define_metric(name, step_metric=over)
                self._axes.add(name)
        self.run.log(point)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table with its images."""
        data = []
        for row in rows:
            data.append([self._cell(cell) for cell in row])
        table = wandb.Table(columns=[*columns], data=data, allow_mixed_types=True)
        self.run.log({name: table})

    def _cell(self, cell: Any) -> Any:
        return wandb.Image(str(cell)) if isinstance(cell, Path) else cell

    def image(self, name: str, path: Path, caption: str = "") -> None:
        """One image file."""
        if path.suffix == ".svg":
            self.run.log({name: wandb.Html(path.read_text())})
        else:
            self.run.log({name: wandb.Image(str(path), caption=caption or None)})

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """A folder or file, unless it is too large to upload."""
        # A full anchor for every beta of a sweep would fill an account.
        files = path.rglob("*") if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
        if size > LARGEST_ARTIFACT:
            warn(f"W&B: {path} is not uploaded as an artifact: it has {size / 1e9:.1f} GB")
            return

        # A new version of it, in this run.
        artifact = wandb.Artifact(NOT_IN_NAMES.sub("-", name)[:LONGEST_NAME], type=kind)
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def uses(self, name: str, kind: str) -> None:
        """The artifact as an input of this run."""
        inputs = sorted({*self.run.config.get("inputs", []), name})
        self.run.config.update({"inputs": inputs}, allow_val_change=True)
        # W&B can link runs only where it can look the other one up.
        if not self.run.offline:
            self.run.use_artifact(f"{name}:latest", type=kind)


def start(
    tracking: TrackingConfig,
    stage: str,
    run_dir: Path,
    config: dict[str, Any],
    group: str,
    stack: ExitStack,
) -> Tracker:
    """Start a run, or go on with it; see `configs.tracking.Start` for the arguments."""
    # Offline where nobody is logged in, unless the config or the environment says otherwise.
    has_key = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
    mode: Any = tracking.mode or (None if has_key else "offline")

    run = wandb.init(
        project=tracking.project,
        group=(tracking.group or group)[:LONGEST_NAME] or None,
        job_type=stage,
        name=run_dir.name,
        id=_run_id(stage, run_dir),
        tags=[stage, *tracking.tags],
        dir=str(run_dir),
        config=config,
        mode=mode,
        resume="allow",
        settings=wandb.Settings(silent=True),
    )
    stack.push(partial(_finish, stage, run))
    if run.url:
        say(f"{stage}: W&B: {run.url}")
    return WandbTracker(run)


def _run_id(stage: str, run_dir: Path) -> str:
    """The id of a run directory in W&B, kept there: a command that resumes goes on in the same run.

    Two directories of one name are two runs.
    """
    file = run_dir / ID_FILE
    if file.is_file():
        return read_text(file).strip()[:LONGEST_NAME]
    tail = f"-{uuid.uuid4().hex[:8]}"
    name = NOT_IN_NAMES.sub("-", f"{stage}-{run_dir.name}")
    run_id = name[: LONGEST_NAME - len(tail)] + tail
    write_atomic(file, run_id + "\n")
    return run_id


def _finish(stage: str, run: Any, kind: type[BaseException] | None, *_: object) -> None:
    """End a run; leave it alone where it does not end. A `with run:` would print a traceback.

    Args:
        stage: the stage's name.
        run: of W&B.
        kind: of the error that ends the stage; None: there is none.

    Raises:
        Exception: whatever W&B raises.
    """
    failures: list[Exception] = []

    def finish() -> None:
        try:
            run.finish(exit_code=1 if kind else 0)
        except Exception as failure:
            failures.append(failure)

    thread = Thread(target=finish, daemon=True)
    thread.start()
    thread.join(FINISH_SECONDS)
    if thread.is_alive():
        ABANDONED.append(str(run.id))
        warn(
            f"{stage}: W&B has not finished within {FINISH_SECONDS:g} seconds; wandb sync "
            f"{Path(run.dir).parent} uploads what is missing"
        )
    if failures:
        raise failures[0]
    if run.offline:
        say(f"{stage}: W&B kept this run here; wandb sync {Path(run.dir).parent} uploads it")
