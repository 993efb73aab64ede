"""The training loop, and nothing else: examples in a fixed order, an optimiser step, a line of metrics, a checkpoint, and on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from deradiff.data.pairs import Examples
from deradiff.training.batches import loader, to_device
from deradiff.training.checkpoints import Checkpoints, Progress
from deradiff.training.meters import Metrics, MetricsFile, Window
from deradiff.training.objectives import Objective
from deradiff.training.optimizers import TrainingOptions, learning_rate_at, set_learning_rate
from deradiff.training.preemption import Listening, Preempted
from deradiff.training.sharding import Trained

SHOWN = ("loss", "implicit_accuracy", "accuracy", "psnr")  # beside the progress bar


def train(
    objective: Objective,
    examples: Examples,
    options: TrainingOptions,
    run_dir: Path,
    accelerator: Accelerator,
    log: Callable[[Metrics, int], None] = lambda metrics, step: None,
    show: Callable[[torch.nn.Module, int], None] = lambda network, step: None,
) -> Progress:
    """Train `objective.network` to `options.steps`, from the newest whole checkpoint if there is one, and leave the trained weights there.

    Every logged step is a line of run_dir/metrics.jsonl and a call of `log`; every `options.show_every`-th step the main process calls
    `show` with the network. The result does not depend on where a run was interrupted.
    Raises FloatingPointError where a loss or gradient stops being finite (the last checkpoint holds good weights), and
    Preempted after a checkpoint that a signal asked for.
    """
    for module in objective.frozen:
        module.to(accelerator.device).eval()
    objective.network.to(accelerator.device).train()
    trained, checkpoints = (
        Trained(objective, options, accelerator),
        Checkpoints(run_dir, options.keep_last, options.keep_best),
    )
    network, optimizer, norm = trained.network, trained.optimizer, torch.tensor(0.0)
    progress = checkpoints.resume(trained.load)
    batches = iter(loader(objective, examples, options, progress.step, accelerator))
    metrics = (
        MetricsFile(run_dir / "metrics.jsonl", progress.step)
        if accelerator.is_main_process
        else None
    )
    bar = tqdm(
        total=options.steps,
        initial=progress.step,
        unit="step",
        disable=metrics is None,
        mininterval=2,
    )
    started, window, recent = (
        time.perf_counter() - progress.seconds,
        Window(options, accelerator),
        _Mean(),
    )

    with Listening() as signals:
        while progress.step < options.steps:
            rate = learning_rate_at(progress.step, options)
            set_learning_rate(optimizer, rate)
            for _ in range(options.accumulation):
                with accelerator.accumulate(network):
                    batch = to_device(next(batches), accelerator.device)
                    with accelerator.autocast():  # the frozen networks too, so that the reference rounds as the trained network does
                        loss, terms = objective.loss(network, batch)
                    accelerator.backward(loss)
                    window.add(loss, terms, batch)
                    recent.add(loss)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(
                            trained.weights.values(), options.max_norm
                        )
                    optimizer.step()
                    optimizer.zero_grad()
            stop = window.check(norm, signals.number, progress.step, checkpoints.newest())
            progress.step += 1
            progress.seconds = time.perf_counter() - started
            bar.update()
            if trained.average:
                trained.average.update(trained.weights, progress.step)
            last = progress.step == options.steps
            if progress.step % options.log_every == 0 or last:
                row = window.close(lr=rate, grad_norm=float(norm if norm is not None else 0))
                bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k in SHOWN})
                if metrics:
                    metrics.append({"step": progress.step, **row})
                    log(row, progress.step)
            if progress.step % options.checkpoint_every == 0 or last or stop:
                progress.loss = recent.close(accelerator)
                checkpoints.write(progress, trained.save, accelerator)
            if stop and not last:
                raise Preempted(stop, progress.step)
            if options.show_every and progress.step % options.show_every == 0:
                _show(trained, show, progress.step, accelerator)

    bar.close()
    accelerator.wait_for_everyone()
    if trained.average:
        trained.take_average()
    if trained.sharded:
        objective.network = trained.snapshot()  # type: ignore[misc]
    return progress


def _show(
    trained: Trained,
    show: Callable[[torch.nn.Module, int], None],
    step: int,
    accelerator: Accelerator,
) -> None:
    """The main process shows, on random numbers that training does not draw from; the others wait."""
    plain = trained.snapshot()
    if accelerator.is_main_process:
        with torch.random.fork_rng():
            show(plain, step)
    accelerator.wait_for_everyone()


class _Mean:
    """Of the losses since the last checkpoint, over all ranks."""

    def __init__(self) -> None:
        self.sum, self.count = torch.tensor(0.0), 0

    def add(self, loss: torch.Tensor) -> None:
        self.sum, self.count = self.sum.to(loss.device) + loss.detach().float(), self.count + 1

    def close(self, accelerator: Accelerator) -> float:
        mean = float(accelerator.reduce(self.sum / self.count, "mean"))
        self.sum, self.count = torch.zeros_like(self.sum), 0
        return mean
