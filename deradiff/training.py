"""The training loop, and nothing else: examples in a fixed order, an optimiser step, a line of metrics, a checkpoint, and on."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from deradiff.checkpoints import Checkpoints, MetricsFile, Progress, assign
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

    @property
    def max_norm(self) -> float:
        """What gradients are clipped to; Adafactor clips its own updates, and clipping twice would change the recipe."""
        return self.clip if self.clip and self.optimizer != "adafactor" else math.inf


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


def make_optimizer(parameters: list[Tensor], options: TrainingOptions) -> torch.optim.Optimizer:
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
    """Train `objective.network` to `options.steps`, from run_dir's newest checkpoint if there is one; leaves the trained weights in it.

    Every logged step is a line of run_dir/metrics.jsonl and a call of `log`. The result does not depend on where a run was interrupted.
    Raises FloatingPointError where gradients stop being finite; the last checkpoint then still holds good weights.
    """
    for module in objective.frozen:
        module.to(accelerator.device).eval()
    objective.network.to(accelerator.device).train()
    trained: dict[str, Tensor] = {n: p for n, p in objective.network.named_parameters() if p.requires_grad}
    average = Average(trained, options.ema) if options.ema else None
    kept = {"weights": trained} | ({"average": average.weights} if average else {})
    network, optimizer = accelerator.prepare(objective.network, make_optimizer(list(trained.values()), options))
    checkpoints = Checkpoints(run_dir, options.keep_checkpoints)
    states = {"optimizer": optimizer} | ({"scaler": accelerator.scaler} if accelerator.scaler else {})
    progress = checkpoints.resume(states, **kept)
    batches = iter(_loader(objective, examples, options, progress.step, accelerator))
    metrics = MetricsFile(run_dir / "metrics.jsonl", progress.step) if accelerator.is_main_process else None
    bar = tqdm(total=options.steps, initial=progress.step, unit="step", disable=metrics is None, mininterval=2)
    started, window = time.perf_counter() - progress.seconds, _Window(options, accelerator)

    while progress.step < options.steps:
        rate = learning_rate_at(progress.step, options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for _ in range(options.accumulation):
            with accelerator.accumulate(network):
                with accelerator.autocast():  # the frozen networks too, so that the reference rounds as the trained network does
                    loss, terms = objective.loss(network, _to(next(batches), accelerator.device))
                accelerator.backward(loss)
                window.add({"loss": loss.detach(), **terms})
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(trained.values(), options.max_norm)
                    if not torch.isfinite(norm) and accelerator.mixed_precision != "fp16":  # fp16's scaler skips such a step itself
                        last = checkpoints.newest() or "no checkpoint"
                        raise FloatingPointError(f"step {progress.step}: the gradient is not finite; {last} holds the last good weights")
                optimizer.step()
                optimizer.zero_grad()
        progress.step += 1
        progress.seconds = time.perf_counter() - started
        bar.update()
        if average:
            average.update(trained, progress.step)
        if progress.step % options.log_every == 0 or progress.step == options.steps:
            row = window.close(lr=rate, grad_norm=float(norm))
            bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k in ("loss", "implicit_accuracy", "accuracy", "psnr")})
            if metrics:
                metrics.append({"step": progress.step, **row})
                log(row, progress.step)
        if metrics and (progress.step % options.checkpoint_every == 0 or progress.step == options.steps):
            checkpoints.write(progress, states, **kept)

    bar.close()
    accelerator.wait_for_everyone()
    if average:
        assign(trained, average.weights)
    return progress


def _loader(objective: Objective, examples: Examples, options: TrainingOptions, step: int, accelerator: Accelerator) -> DataLoader:
    batches = MicroBatches(objective, examples, options, step, accelerator)
    # Workers inherit the objective by fork: accelerate's wrapped networks cannot be sent to a fresh process.
    workers = options.workers if "fork" in multiprocessing.get_all_start_methods() else 0
    context = "fork" if workers else None
    return DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context=context, persistent_workers=workers > 0)


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
