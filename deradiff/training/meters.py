"""The numbers of a run: means over a window of steps, pace, memory, and whether all are finite."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from deradiff.files import append_line, write_atomic
from deradiff.models.gpus import peak_tflops
from deradiff.training.objectives.base import Batch
from deradiff.training.options import TrainingOptions

Metrics = dict[str, float]
BANDS = 4  # of time; their names count timesteps, from 0 (data) to 1000 (noise)
BLAMED = 4  # pairs that an error names at most
NAMING = ("index", "time")  # the tensors of a batch that name its pairs


def peak_flops(device: torch.device) -> float | None:
    """FLOPs a second of one device in half precision, or None where that is unknown."""
    if device.type != "cuda":
        return None
    tflops = peak_tflops(torch.cuda.get_device_name(device))
    return None if tflops is None else tflops * 1e12


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held, in GB: of the GPU if it uses one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return largest * unit / 1e9


@dataclass(frozen=True)
class EndedStep:
    """An optimiser step that was taken, on this rank.

    Attributes:
        step: its number, from 0.
        bad: whether a loss or the gradient is not finite; a scalar on the device.
        losses: of each micro-batch, one per example where the objective gives them, with the
            tensors of NAMING.
    """

    step: int
    bad: Tensor
    losses: list[tuple[Tensor, Batch]]

    def problem(self) -> str:
        """What was not finite: the pairs and the times of a loss, or the gradient."""
        if not bool(self.bad):
            return "another rank has a loss or gradient that is not finite"
        for rows, batch in self.losses:
            wrong = (~rows.flatten().isfinite()).nonzero().flatten().tolist()
            if not wrong:
                continue
            if not set(NAMING) <= set(batch):
                return "the loss is not finite"
            # A scalar loss does not tell which example it was: all are named.
            positions = wrong if rows.dim() else range(len(batch["index"]))
            pairs = []
            for i in positions:
                timestep = 1000 * float(batch["time"][i])
                pairs.append(f"{int(batch['index'][i])} at t {timestep:.0f}")
            named = ", ".join(pairs[:BLAMED])
            return f"the loss is not finite, from pair {named} (row of those used)"
        return "the gradient is not finite"


class Window:
    """Means of the metrics since the last logged step, over all ranks and examples.

    Metrics are scalars, or (B,) with a value per example. `implicit_accuracy` (B,) is also
    averaged per band of time.

    Args:
        options: of the run.
        accelerator: of the run.
    """

    def __init__(self, options: TrainingOptions, accelerator: Accelerator) -> None:
        self.options = options
        self.accelerator = accelerator
        self.peak = peak_flops(accelerator.device)
        self._sums: dict[str, Tensor] = {}  # (2,): sum and count of each metric
        # The losses of the running optimiser step, one per example where the objective gives them.
        self._losses: list[tuple[Tensor, Batch]] = []
        self._steps = 0
        self._start = time.perf_counter()

    def add(self, loss: Tensor, terms: dict[str, Tensor], batch: Batch) -> None:
        """Add one micro-batch.

        Args:
            loss: the scalar loss.
            terms: other metrics; `loss` among them replaces the scalar.
            batch: what they were computed on.
        """
        # Each metric adds to its sum and its count.
        values = {"loss": loss.detach().float()}
        for name, value in terms.items():
            values[name] = value.detach().float()
        for name, value in values.items():
            self._sum(name, value)

        # The accuracy of each pair also adds to its band of time.
        accuracy = values.get("implicit_accuracy")
        if accuracy is not None and accuracy.dim() == 1 and "time" in batch:
            self._sum_bands("implicit_accuracy", accuracy, batch["time"])

        # Kept until it is known to be finite, to find the pair behind it if it is not.
        named = {name: batch[name] for name in NAMING if name in batch}
        self._losses.append((values["loss"], named))

    def _sum(self, name: str, values: Tensor, counts: Tensor | None = None) -> None:
        """Add values to a metric's sum. All stays on the device: nothing waits for it.

        Args:
            name: of the metric.
            values: of any shape.
            counts: 1 for each value that counts, 0 for the others; None: all count.
        """
        if counts is None:
            counts = torch.ones_like(values)
        counted = torch.where(counts > 0, values, 0.0)
        own = torch.stack([counted.sum(), counts.sum()])
        self._sums[name] = self._sums[name] + own if name in self._sums else own

    def _sum_bands(self, name: str, values: Tensor, time: Tensor) -> None:
        """Sum values (B,) by the band of their time (B,) in [0, 1]."""
        bands = (time * BANDS).long().clamp(0, BANDS - 1)
        for band in range(BANDS):
            start = band * 1000 // BANDS
            stop = (band + 1) * 1000 // BANDS
            self._sum(f"{name}/t{start}-{stop}", values, (bands == band).to(values.dtype))

    def end_step(self, step: int, norm: Tensor | float | None) -> EndedStep:
        """End an optimiser step. Nothing is read from the device.

        Args:
            step: its number, from 0.
            norm: of the gradient; None: unknown.
        """
        losses = torch.cat([rows.flatten() for rows, _ in self._losses])
        bad = ~losses.isfinite().all()
        # With fp16 the gradient may overflow: the scaler then skips the step.
        if norm is not None and self.accelerator.mixed_precision != "fp16":
            bad = bad | ~torch.as_tensor(norm, device=bad.device).isfinite()
        ended = EndedStep(step, bad, self._losses)
        self._losses = []
        self._steps += 1
        return ended

    def close(self, **more: float) -> Metrics:
        """The means since the last call, over all ranks; collective. more: metrics to add."""
        # The means: the sums and counts of all ranks travel as one tensor.
        names = list(self._sums)
        sums = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum")
        means = {}
        for name, (total, count) in zip(names, sums.tolist()):
            if count:
                means[name] = total / count

        # Pace, memory and, where the GPU's peak is known, the share of it that is used.
        now = time.perf_counter()
        steps_per_second = self._steps / (now - self._start)
        devices = self.accelerator.num_processes
        means |= more
        means["pairs_per_second"] = steps_per_second * self.options.pairs_per_step
        means["memory_gb"] = peak_memory(self.accelerator.device)
        if self.peak and self.options.flops_per_step:
            means["mfu"] = steps_per_second * self.options.flops_per_step / (self.peak * devices)

        # The next window begins.
        self._sums = {}
        self._steps = 0
        self._start = now
        return means


class MetricsFile:
    """`metrics.jsonl`: one line for each logged step.

    Args:
        path: of the file.
        step: the step that the run resumes at. Later lines, of a run that was killed, are removed,
            and so are torn ones.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        kept = [line + b"\n" for line in lines if _is_up_to(line, step)]
        write_atomic(path, b"".join(kept))

    def append(self, row: dict[str, Any]) -> None:
        """Add a line."""
        append_line(self.path, json.dumps(row))


def _is_up_to(line: bytes, step: int) -> bool:
    """Whether a line is a whole one, of a step up to this."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
