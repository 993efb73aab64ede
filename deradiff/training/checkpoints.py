"""Checkpoints of a training run: nothing that it did is lost, whatever kills it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from deradiff.files import write_atomic

PROGRESS = "progress.json"  # written last: a folder without it is no checkpoint
BLOCK = 1 << 24  # bytes read at once


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done.
        seconds: wall-clock time of training, interruptions not counted.
        loss: its mean since the checkpoint before; None: unknown.
    """

    step: int = 0
    seconds: float = 0.0
    loss: float | None = None


class Checkpoints:
    """The folders `checkpoints/step-000200/` of a run.

    A checkpoint holds what a function `save(folder)` writes, and `progress.json` with a checksum of
    each file. It is written aside, synced to the disk, and renamed.

    Args:
        run_dir: the run directory.
        keep_last: how many of the newest stay.
        keep_best: how many of the lowest loss stay.
    """

    def __init__(self, run_dir: Path, keep_last: int, keep_best: int = 0) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep_last = keep_last
        self.keep_best = keep_best

    def whole(self) -> list[Path]:
        """All complete checkpoints, the newest last."""
        folders = [path for path in self.folder.glob("step-*") if (path / PROGRESS).is_file()]
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        folders = self.whole()
        return folders[-1] if folders else None

    def write(
        self, progress: Progress, save: Callable[[Path], None], accelerator: Accelerator
    ) -> None:
        """Write a checkpoint; collective.

        Args:
            progress: how far the run is.
            save: writes the state into a folder; every rank calls it with the same one.
            accelerator: of the run.
        """
        # Each rank writes its part into a folder aside.
        part = self.folder / ".part"
        if accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        accelerator.wait_for_everyone()
        save(part)
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return

        # The main process makes it a checkpoint: checksums, then the new name.
        checksums = {}
        for file in sorted(part.rglob("*")):
            if file.is_file():
                checksums[file.relative_to(part).as_posix()] = _checksum(file)
        write_atomic(part / PROGRESS, json.dumps(asdict(progress) | {"files": checksums}))
        _sync(part)
        final = self.folder / f"step-{progress.step:06d}"
        shutil.rmtree(final, ignore_errors=True)  # a torn one of this step, which was skipped
        os.replace(part, final)
        _sync(self.folder)
        self._prune()

    def _prune(self) -> None:
        """Remove all but the newest and the best."""
        whole = self.whole()

        # The best: the lowest loss, and of equal losses the older one.
        losses = {}
        for folder in whole:
            loss = _progress(folder).loss
            if loss is not None:
                losses[folder] = loss
        best = sorted(losses, key=lambda folder: (losses[folder], folder.name))

        kept = {*whole[-self.keep_last :], *best[: self.keep_best]}
        for folder in whole:
            if folder not in kept:
                shutil.rmtree(folder)

    def resume(self, load: Callable[[Path], None]) -> Progress:
        """Load the newest complete checkpoint.

        A torn one is named on stderr and skipped.

        Args:
            load: reads the state from a folder.

        Returns:
            How far the run was; step 0 where there is no checkpoint.
        """
        for folder in reversed(self.whole()):
            # The state is loaded only where every file is as it was written.
            try:
                _check(folder)
                load(folder)
                return _progress(folder)
            except (OSError, EOFError, ValueError, SafetensorError) as error:
                message = f"train: the checkpoint {folder} is torn and is skipped: {error}"
                print(message, file=sys.stderr, flush=True)
        return Progress()


def _progress(folder: Path) -> Progress:
    values = _read(folder)
    known = {key: values[key] for key in ("step", "seconds", "loss") if key in values}
    return Progress(**known)


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / PROGRESS).read_text())


def _check(folder: Path) -> None:
    """Raise ValueError where a file of the checkpoint is missing or has changed."""
    for name, checksum in _read(folder).get("files", {}).items():
        file = folder / name
        if not file.is_file() or _checksum(file) != checksum:
            raise ValueError(f"{name} is not what was written")


def _checksum(file: Path) -> int:
    """CRC-32 of a file, which is on the disk when this returns."""
    value = 0
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
        while block := handle.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def _sync(folder: Path) -> None:
    """The names in a folder are on the disk only when the folder itself is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
