"""The training loop, and nothing else: examples in a fixed order, an optimiser step, a line of metrics, a checkpoint, and on."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from deradiff.data.pairs import Examples, schedule
from deradiff.objectives import Batch, Objective

Metrics = dict[str, float]


@dataclass
class TrainingOptions:
    """steps: optimiser steps in all. batch_size: examples of one forward on one device. learning_rate: the actual one.

    decay: `constant` or `cosine` (to zero at the last step), after `warmup` linear steps. clip: gradient norm; 0 leaves gradients alone.
    ema: decay of an exponential moving average that is saved in place of the weights; 0: none.
    """

    steps: int
    batch_size: int
    learning_rate: float
    accumulation: int = 1
    warmup: int = 0
    decay: str = "constant"
    optimizer: str = "adamw"
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema: float = 0.0
    seed: int = 0
    workers: int = 0
    log_every: int = 10
    checkpoint_every: int = 200
    keep_checkpoints: int = 2


@dataclass
class Progress:
    """What a run has done so far; kept in its checkpoints. seconds: wall-clock of training, over all its sittings."""

    step: int = 0
    seconds: float = 0.0


class MicroBatches(Dataset):
    """Micro-batch i of this process, from step `first` on; collated by the objective."""

    def __init__(self, objective: Objective, examples: Examples, options: TrainingOptions, first: int, accelerator: Accelerator) -> None:
        self.objective, self.examples, self.options, self.first = objective, examples, options, first
        self.rank, self.world = accelerator.process_index, accelerator.num_processes

    def __len__(self) -> int:
        return (self.options.steps - self.first) * self.options.accumulation

    def __getitem__(self, i: int) -> Batch:
        o = self.options
        step, micro = self.first + i // o.accumulation, i % o.accumulation
        places = list(schedule(len(self.examples.data), o.seed, o.batch_size * o.accumulation * self.world, step))
        start = (micro * self.world + self.rank) * o.batch_size
        return self.objective.collate([self.examples.item(*place) for place in places[start : start + o.batch_size]])


def learning_rate_at(step: int, options: TrainingOptions) -> float:
    """Linear warm-up, then constant or a cosine to zero."""
    rate = options.learning_rate * min(1.0, (step + 1) / (options.warmup + 1))
    if options.decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / options.steps))
    return rate


def make_optimizer(parameters: list[nn.Parameter], options: TrainingOptions) -> torch.optim.Optimizer:
    """AdamW (.9, .999), or Adafactor as the SDXL recipe sets it: it clips its own updates, so gradients are not clipped again."""
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters,
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        scale_parameter=False,
        relative_step=False,
        clip_threshold=1.0,
    )


class Checkpoints:
    """`checkpoints/step-000200/`: trained weights and average as safetensors, optimiser state as tensors; written aside, then renamed."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.folder, self.keep = run_dir / "checkpoints", keep

    def newest(self) -> Path | None:
        whole = sorted(p for p in self.folder.glob("step-*") if (p / "progress.json").is_file())
        return whole[-1] if whole else None

    def write(self, weights: dict[str, dict[str, Tensor]], optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        part = self.folder / f".part-{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, tensors in weights.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part / f"{name}.safetensors")
        torch.save(optimizer.state_dict(), part / "optimizer.pt")
        (part / "progress.json").write_text(json.dumps(asdict(progress)))
        for file in part.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        final = self.folder / f"step-{progress.step:06d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            shutil.rmtree(old)


class Average:
    """Exponential moving average of the trained weights: decay min(ema, (1 + step) / (10 + step)), as Karras et al. warm it up."""

    def __init__(self, trained: dict[str, Tensor], decay: float) -> None:
        self.decay, self.weights = decay, {k: v.detach().clone() for k, v in trained.items()}

    @torch.no_grad()
    def update(self, trained: dict[str, Tensor], step: int) -> None:
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in trained.items():
            self.weights[name].lerp_(tensor, 1 - keep)


def train(
    objective: Objective, examples: Examples, options: TrainingOptions, run_dir: Path, accelerator: Accelerator,
    log: Callable[[Metrics, int], None] = lambda metrics, step: None,
) -> Progress:  # fmt: skip
    """Train `objective.network` to `options.steps`, from the newest checkpoint in run_dir if there is one; leaves the trained weights in it.

    Every logged step is a line of run_dir/metrics.jsonl and a call of `log`. The result does not depend on where a run was interrupted.
    Raises FloatingPointError where gradients stop being finite; the last checkpoint then still holds good weights.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for module in objective.frozen:
        module.to(accelerator.device).eval()
    objective.network.to(accelerator.device).train()
    trained = {n: p for n, p in objective.network.named_parameters() if p.requires_grad}
    average = Average(trained, options.ema) if options.ema else None
    network, optimizer = accelerator.prepare(objective.network, make_optimizer(list(trained.values()), options))
    checkpoints, progress = Checkpoints(run_dir, options.keep_checkpoints), Progress()
    if newest := checkpoints.newest():
        progress = _resume(newest, trained, average, optimizer)
    _rewind_metrics(run_dir / "metrics.jsonl", progress.step, accelerator)

    data = MicroBatches(objective, examples, options, progress.step, accelerator)
    batches = iter(DataLoader(data, batch_size=None, num_workers=options.workers, persistent_workers=options.workers > 0))
    bar = tqdm(total=options.steps, initial=progress.step, unit="step", disable=not accelerator.is_main_process, mininterval=2)
    started, window = time.perf_counter() - progress.seconds, _Window(options, accelerator)
    while progress.step < options.steps:
        rate = learning_rate_at(progress.step, options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for _ in range(options.accumulation):
            with accelerator.accumulate(network):
                loss, terms = objective.loss(network, _to(next(batches), accelerator.device))
                accelerator.backward(loss)
                window.add({"loss": loss.detach(), **terms})
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(trained.values(), options.clip or math.inf)
                    if not torch.isfinite(norm) and accelerator.mixed_precision != "fp16":
                        raise FloatingPointError(
                            f"step {progress.step}: the gradient is not finite; {checkpoints.newest()} holds the last good weights"
                        )
                optimizer.step()
                optimizer.zero_grad()
        progress.step += 1
        progress.seconds = time.perf_counter() - started
        bar.update()
        if average:
            average.update(trained, progress.step)
        if progress.step % options.log_every == 0 or progress.step == options.steps:
            metrics = window.close(lr=rate, grad_norm=float(norm))
            bar.set_postfix({k: f"{v:.4g}" for k, v in metrics.items() if k in ("loss", "implicit_accuracy", "accuracy", "psnr")})
            if accelerator.is_main_process:
                _append(run_dir / "metrics.jsonl", {"step": progress.step, **metrics})
                log(metrics, progress.step)
        if accelerator.is_main_process and (progress.step % options.checkpoint_every == 0 or progress.step == options.steps):
            weights = {"weights": trained} | ({"average": average.weights} if average else {})
            checkpoints.write(weights, optimizer, progress)
    bar.close()
    accelerator.wait_for_everyone()
    if average:
        _assign(trained, average.weights)
    return progress


@torch.no_grad()
def _assign(trained: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    for name, tensor in trained.items():
        tensor.copy_(weights[name])


def _resume(folder: Path, trained: dict[str, Tensor], average: Average | None, optimizer: Any) -> Progress:
    _assign(trained, load_file(folder / "weights.safetensors"))
    if average:
        average.weights = {k: v.to(trained[k].device) for k, v in load_file(folder / "average.safetensors").items()}
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
    return Progress(**json.loads((folder / "progress.json").read_text()))


def _rewind_metrics(file: Path, step: int, accelerator: Accelerator) -> None:
    """Drop the lines that a killed run logged after its last checkpoint, and a torn last line: they are about to be written again."""
    if not accelerator.is_main_process or not file.is_file():
        return
    from deradiff.runs import write_atomic

    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    write_atomic(file, "".join(kept))


def _append(file: Path, row: dict[str, Any]) -> None:
    with open(file, "a") as handle:
        handle.write(json.dumps(row) + "\n")


def _to(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


class _Window:
    """Means of the metrics since the last logged step, over all ranks."""

    def __init__(self, options: TrainingOptions, accelerator: Accelerator) -> None:
        self.options, self.accelerator = options, accelerator
        self.sums: dict[str, Tensor] = {}
        self.count, self.since = 0, time.perf_counter()

    def add(self, terms: dict[str, Tensor]) -> None:
        self.sums = {k: self.sums.get(k, 0.0) + v.detach().float() for k, v in terms.items()}
        self.count += 1

    def close(self, **more: float) -> Metrics:
        means = {k: float(self.accelerator.reduce(v / self.count, "mean")) for k, v in self.sums.items()}
        seen = self.count * self.options.batch_size * self.accelerator.num_processes
        now = time.perf_counter()
        means |= {**more, "pairs_per_second": seen / (now - self.since)}
        self.sums, self.count, self.since = {}, 0, now
        return means
