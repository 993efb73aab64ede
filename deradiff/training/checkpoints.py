"""Checkpoints of a training run: nothing that it did is lost, whatever kills it."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from deradiff.digests import sealed, unsealed
from deradiff.files import write_atomic, writing
from deradiff.terminal import warn
from deradiff.text_files import read_json

PROGRESS = "progress.json"  # written last: a folder without it is no checkpoint
FILES = "files"  # its key of the checksums
BLOCK = 1 << 24  # bytes read at once


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done.
        seconds: wall-clock time of training, interruptions not counted.
        loss: its mean since the checkpoint before; None: unknown.
        device_seconds: the same time, summed over the ranks that there were.
    """

    step: int = 0
    seconds: float = 0.0
    loss: float | None = None
    device_seconds: float = 0.0

    def count_time(self, seconds: float, ranks: int) -> None:
        """Add wall-clock time in which so many ranks trained."""
        self.seconds += seconds
        self.device_seconds += seconds * ranks


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
        folders = {}
        for path in self.folder.glob("step-*"):
            number = path.name.removeprefix("step-")
            if number.isdecimal() and (path / PROGRESS).is_file():
                folders[path] = int(number)
        return sorted(folders, key=lambda path: folders[path])

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

        Raises:
            OSError: where it cannot be written; older ones stay.
        """
        # Each rank writes its part into a folder aside.
        part = self.folder / ".part"
        if accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
            with writing(part):
                part.mkdir(parents=True)
        accelerator.wait_for_everyone()
        try:
            with writing(part):
                save(part)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                with writing(part):
                    self._complete(part, progress)
        except OSError:
            # What did not fit makes room again.
            shutil.rmtree(part, ignore_errors=True)
            raise

    def _complete(self, part: Path, progress: Progress) -> None:
        """Make a written folder a checkpoint: checksums, then the new name."""
        checksums = {}
        for file in sorted(part.rglob("*")):
            if file.is_file():
                checksums[file.relative_to(part).as_posix()] = _checksum(file)
        values = sealed(asdict(progress) | {FILES: checksums})
        write_atomic(part / PROGRESS, json.dumps(values))
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
            loss = _loss(folder)
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
                warn(message)
        return Progress()


def _progress(folder: Path) -> Progress:
    """How far a checkpoint is. Raises ValueError where its `progress.json` has changed."""
    values = _read(folder)
    del values[FILES]
    return Progress(**values)


def _loss(folder: Path) -> float | None:
    """The loss of a checkpoint; None where it is unknown, or cannot be read."""
    try:
        return _progress(folder).loss
    except ValueError:
        return None


def _read(folder: Path) -> dict[str, Any]:
    """The content of `progress.json`. Raises ValueError where it is not what was written."""
    try:
        values = unsealed(read_json(folder / PROGRESS))
    except ValueError as error:
        raise ValueError(f"{PROGRESS}: {error}") from error
    # Those of earlier versions have no digest, and no key that we do not know.
    known = {field.name for field in fields(Progress)} | {FILES}
    is_ours = set(values) <= known and FILES in values
    if not is_ours or values.get("step") != int(folder.name.removeprefix("step-")):
        raise ValueError(f"{PROGRESS} is not what was written")
    return values


def _check(folder: Path) -> None:
    """Raise ValueError where a file of the checkpoint is missing or has changed."""
    for name, checksum in _read(folder)[FILES].items():
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
