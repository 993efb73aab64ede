"""What a run says about itself: means over a window of steps, its pace, and whether its numbers still are numbers."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from deradiff.files import write_atomic
from deradiff.models.published import peak_tflops
from deradiff.training.objectives import Batch
from deradiff.training.optimizers import TrainingOptions

Metrics = dict[str, float]
BANDS = 4  # of time, told in timesteps: 0 data, 1000 noise


def peak_flops(device: torch.device) -> float | None:
    """FLOPs a second of one device in half precision, or None where that is not known."""
    if device.type != "cuda":
        return None
    tflops = peak_tflops(torch.cuda.get_device_name(device))
    return None if tflops is None else tflops * 1e12


def peak_memory(device: torch.device) -> float:
    """GB that this process held at most: of the GPU's memory where it has one, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


class Window:
    """Means of the metrics since the last logged step, over all ranks and pairs.

    Terms are scalars, or (B,) with a value per pair; `implicit_accuracy` per pair is told by band of time too.
    """

    def __init__(self, options: TrainingOptions, accelerator: Accelerator) -> None:
        self.options, self.accelerator, self.peak = (
            options,
            accelerator,
            peak_flops(accelerator.device),
        )
        self.sums: dict[str, Tensor] = {}  # (2,): sum and count
        self.step: list[
            tuple[Tensor, Batch]
        ] = []  # losses of the running optimiser step, a value per pair where there is one
        self.since, self.steps = time.perf_counter(), 0

    def add(self, loss: Tensor, terms: dict[str, Tensor], batch: Batch) -> None:
        terms = {k: v.detach().float() for k, v in terms.items()}
        for key, value in ({"loss": loss.detach().float()} | terms).items():
            self._sum(key, value)
        accuracy = terms.get("implicit_accuracy", loss)
        if accuracy.dim() == 1 and "time" in batch:
            band = (batch["time"] * BANDS).long().clamp(0, BANDS - 1)
            for i in range(BANDS):
                self._sum(
                    f"implicit_accuracy/t{i * 1000 // BANDS}-{(i + 1) * 1000 // BANDS}",
                    accuracy[band == i],
                )
        self.step.append((terms.get("loss", loss.detach()), batch))

    def _sum(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums.get(key, 0.0) + torch.stack(
            [value.sum(), torch.tensor(float(value.numel()), device=value.device)]
        )

    def check(self, norm: Tensor | float | None, number: int, step: int, kept: Path | None) -> int:
        """End of an optimiser step: the largest signal number that any rank heard. All ranks raise FloatingPointError where the loss or the
        gradient of one is not finite; with fp16 the gradient may overflow, and the scaler skips that step."""
        losses = torch.cat([rows.flatten() for rows, _ in self.step])
        gradient = torch.tensor(
            1.0 if norm is None or self.accelerator.mixed_precision == "fp16" else float(norm)
        )
        bad = not (losses.isfinite().all() and gradient.isfinite())
        told = self._blame() if bad else ""
        self.step, self.steps = [], self.steps + 1
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.gather(
                torch.tensor([[float(bad), float(number)]], device=self.accelerator.device)
            )
            bad, number = bool(flags[:, 0].any()), int(flags[:, 1].max())
        if bad:
            good = f"{kept} holds the last good weights" if kept else "there is no checkpoint yet"
            raise FloatingPointError(
                f"step {step}: {told or 'another rank has a loss or gradient that is not finite'}; {good}"
            )
        return number

    def _blame(self) -> str:
        """The pair and the time of a loss that is not finite."""
        for rows, batch in self.step:
            wrong = (~rows.flatten().isfinite()).nonzero().flatten().tolist()
            if not wrong:
                continue
            if not {"index", "time"} <= set(batch):
                return "the loss is not finite"
            places = (
                wrong if rows.dim() else range(len(batch["index"]))
            )  # a mean does not tell which of them
            pairs = [
                f"{int(batch['index'][i])} at t {1000 * float(batch['time'][i]):.0f}"
                for i in places
            ]
            return f"the loss is not finite, from pair {', '.join(pairs[:4])} (row of those used)"
        return "the gradient is not finite"

    def close(self, **more: float) -> Metrics:
        keys = list(self.sums)
        sums = self.accelerator.reduce(torch.stack([self.sums[k] for k in keys]), "sum").tolist()
        means = {key: total / count for key, (total, count) in zip(keys, sums) if count}
        now = time.perf_counter()
        pace, o = self.steps / (now - self.since), self.options
        per_step = o.batch_size * o.accumulation * self.accelerator.num_processes
        means |= {
            **more,
            "pairs_per_second": pace * per_step,
            "memory_gb": peak_memory(self.accelerator.device),
        }
        if self.peak and o.flops_per_step:
            means["mfu"] = pace * o.flops_per_step / (self.peak * self.accelerator.num_processes)
        self.sums, self.steps, self.since = {}, 0, now
        return means


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
