"""What a training run keeps on disk so that nothing it did is lost, whatever kills it: checkpoints, and its lines of metrics."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deradiff.runs import write_atomic

Weights = dict[str, Tensor]


@dataclass
class Progress:
    """What a run has done so far. seconds: wall-clock of training, over all its sittings."""

    step: int = 0
    seconds: float = 0.0


class Checkpoints:
    """`checkpoints/step-000200/`: trained weights and their average, and the optimiser's tensors; written aside, then renamed."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.folder, self.keep = run_dir / "checkpoints", keep

    def whole(self) -> list[Path]:
        """All checkpoints, the newest last; a folder without its last file is none."""
        return sorted((p for p in self.folder.glob("step-*") if (p / "progress.json").is_file()), key=lambda p: int(p.name[5:]))

    def newest(self) -> Path | None:
        return next(reversed(self.whole()), None)

    def write(self, progress: Progress, states: dict[str, Any], **weights: Weights) -> None:
        """states: the optimiser, and fp16's loss scaler where there is one: whatever has a `state_dict` of tensors and numbers."""
        part = self.folder / f".part-{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, tensors in weights.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part / f"{name}.safetensors")
        for name, state in states.items():
            torch.save(state.state_dict(), part / f"{name}.pt")
        (part / "progress.json").write_text(json.dumps(asdict(progress)))
        for file in part.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        final = self.folder / f"step-{progress.step:06d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        for old in self.whole()[: -self.keep]:
            shutil.rmtree(old)

    def resume(self, states: dict[str, Any], **weights: Weights) -> Progress:
        """Load the newest checkpoint into the tensors and the states, in place; a fresh `Progress` where there is none."""
        newest = self.newest()
        if newest is None:
            return Progress()
        for name, tensors in weights.items():
            assign(tensors, load_file(newest / f"{name}.safetensors"))
        for name, state in states.items():
            state.load_state_dict(torch.load(newest / f"{name}.pt", map_location="cpu", weights_only=True))
        return Progress(**json.loads((newest / "progress.json").read_text()))


@torch.no_grad()
def assign(into: Weights, values: Weights) -> None:
    """Copy tensors by name, in place."""
    for name, tensor in into.items():
        tensor.copy_(values[name])


class MetricsFile:
    """`metrics.jsonl`, a line a logged step. Opened at a step, it forgets what a killed run logged after that, and a torn last line."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                break
        write_atomic(path, "".join(kept))

    def append(self, row: dict[str, Any]) -> None:
        with open(self.path, "a") as handle:
            handle.write(json.dumps(row) + "\n")
