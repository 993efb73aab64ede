"""What a training run keeps on disk so that nothing it did is lost, whatever kills it."""

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


@dataclass
class Progress:
    """What a run has done so far. seconds: wall-clock of training, over all its sittings. loss: its mean since the checkpoint before."""

    step: int = 0
    seconds: float = 0.0
    loss: float | None = None


class Checkpoints:
    """`checkpoints/step-000200/`: what a `save(folder)` writes, and `progress.json` with a checksum of each file.

    Written aside, synced, renamed. The `keep_last` newest and the `keep_best` of the lowest loss stay.
    """

    def __init__(self, run_dir: Path, keep_last: int, keep_best: int = 0) -> None:
        self.folder, self.keep_last, self.keep_best = run_dir / "checkpoints", keep_last, keep_best

    def whole(self) -> list[Path]:
        """All checkpoints, the newest last; a folder without its last file is none."""
        return sorted(
            (p for p in self.folder.glob("step-*") if (p / "progress.json").is_file()),
            key=lambda p: int(p.name[5:]),
        )

    def newest(self) -> Path | None:
        return next(reversed(self.whole()), None)

    def write(
        self, progress: Progress, save: Callable[[Path], None], accelerator: Accelerator
    ) -> None:
        """Collective: each rank saves what it has to, the main process makes it a checkpoint."""
        part = self.folder / ".part"
        if accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        accelerator.wait_for_everyone()
        save(part)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            sums = {
                file.relative_to(part).as_posix(): _checksum(file)
                for file in sorted(part.rglob("*"))
                if file.is_file()
            }
            _write_synced(part / "progress.json", json.dumps(asdict(progress) | {"files": sums}))
            final = self.folder / f"step-{progress.step:06d}"
            shutil.rmtree(final, ignore_errors=True)  # a torn one, which was skipped
            os.replace(part, final)
            _sync(self.folder)
            self._prune()

    def _prune(self) -> None:
        whole = self.whole()
        best = sorted(
            (p for p in whole if _progress(p).loss is not None),
            key=lambda p: (_progress(p).loss, p.name),
        )
        stay = {*whole[-self.keep_last :], *best[: self.keep_best]}
        for old in whole:
            if old not in stay:
                shutil.rmtree(old)

    def resume(self, load: Callable[[Path], None]) -> Progress:
        """Load the newest whole checkpoint; a fresh `Progress` where there is none. A torn one is named on stderr and skipped."""
        for folder in reversed(self.whole()):
            try:
                _check(folder)
                load(folder)
                return _progress(folder)
            except (OSError, EOFError, ValueError, SafetensorError) as error:
                print(
                    f"train: the checkpoint {folder} is torn and is skipped: {error}",
                    file=sys.stderr,
                    flush=True,
                )
        return Progress()


def _progress(folder: Path) -> Progress:
    values = _read(folder)
    return Progress(**{key: values[key] for key in ("step", "seconds", "loss") if key in values})


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "progress.json").read_text())


def _check(folder: Path) -> None:
    for name, checksum in _read(folder).get("files", {}).items():
        if not (folder / name).is_file() or _checksum(folder / name) != checksum:
            raise ValueError(f"{name} is not what was written")


def _checksum(file: Path) -> int:
    """CRC-32 of a file, which is on disk when this returns."""
    value = 0
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
        while block := handle.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _write_synced(file: Path, text: str) -> None:
    with open(file, "w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    _sync(file.parent)


def _sync(folder: Path) -> None:
    """The names in a folder, too, are on disk only when the folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
