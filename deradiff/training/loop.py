"""The training loop: examples in a fixed order, optimiser steps, metrics, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from deradiff.data.pairs import Examples
from deradiff.progress import LivingBar
from deradiff.training.batches import micro_batches, to_device
from deradiff.training.checkpoints import Checkpoints, Progress
from deradiff.training.meters import EndedStep, Metrics, MetricsFile, Window
from deradiff.training.objectives.base import Batch, Objective
from deradiff.training.optimizers import learning_rate_at, set_learning_rate
from deradiff.training.options import TrainingOptions
from deradiff.training.preemption import Listening, Preempted
from deradiff.training.same_run import check_same, weights_checksum
from deradiff.training.sharding import TrainedNetwork
from deradiff.training.shares import Shares
from deradiff.training.step_flags import Exchange

IN_PROGRESS_BAR = ("loss", "implicit_accuracy", "accuracy", "psnr")


def _ignore_metrics(metrics: Metrics, step: int) -> None:
    """Metrics go to metrics.jsonl only."""


def _show_nothing(network: torch.nn.Module, step: int) -> None:
    """Nothing is shown during training."""


def train(
    objective: Objective,
    examples: Examples,
    options: TrainingOptions,
    run_dir: Path,
    accelerator: Accelerator,
    log: Callable[[Metrics, int], None] = _ignore_metrics,
    show: Callable[[torch.nn.Module, int], None] = _show_nothing,
) -> Progress:
    """Train `objective.network`, and leave the trained weights there.

    Training starts from the newest checkpoint of the run directory, if there is one. The result
    does not depend on where a run was interrupted.

    Args:
        objective: what is trained.
        examples: the training data, in the order of the run.
        options: how it is trained.
        run_dir: the folder of `metrics.jsonl` and `checkpoints/`.
        accelerator: its gradient accumulation is set to what follows from the options.
        log: called by the main process with the metrics of every logged step.
        show: called by the main process with the network, every `options.show_every` steps; after
            an interruption also once more for the step that it resumes at.

    Returns:
        How far the run is: all its steps, and the time that they took.

    Raises:
        FloatingPointError: where a loss or a gradient is not finite. The last checkpoint holds
            good weights.
        Preempted: after the checkpoint that a signal asked for.
    """
    # Which pairs of a step are this rank's.
    shares = Shares(options.pairs_per_step, options.batch_size, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = shares.accumulation

    # Networks to the device, and the state of the newest checkpoint into them.
    for module in objective.frozen:
        module.to(accelerator.device).eval()
    objective.network.to(accelerator.device).train()
    trained = TrainedNetwork(objective, options, accelerator)
    checkpoints = Checkpoints(run_dir, options.keep_last, options.keep_best)
    progress = _resume(checkpoints, trained)
    batches = micro_batches(objective, examples, options, shares, progress.step, accelerator)

    # What the run reports. The time of a run goes on where it was interrupted.
    report = _Report(run_dir, options, progress, accelerator, log)
    window = Window(options, accelerator)
    checkpoint_loss = _MeanLoss()
    flags = Exchange(accelerator)
    lap = time.perf_counter()

    with Listening() as signals:
        # What a kill has left out, behind the checkpoint.
        _show(trained, show, progress.step, options, accelerator)
        while progress.step < options.steps:
            # One optimiser step.
            rate = learning_rate_at(progress.step, options)
            set_learning_rate(trained.optimizer, rate)
            for turn in range(shares.accumulation):
                report.bar.doing = f"batch {turn + 1} of {shares.accumulation}"
                weight = shares.weight(turn, accelerator.process_index)
                loss, terms, batch = _micro_step(objective, trained, next(batches), weight, options)
                if weight:
                    window.add(loss, terms, batch)
                    checkpoint_loss.add(loss)

            # All ranks hear whether a number is bad, and whether a signal asked for a stop.
            ended = window.end_step(progress.step, trained.norm)
            flags.send(ended, signals.signal_number)
            progress.step += 1
            failed, stop_signal = flags.read(all_steps=_is_written(progress.step, options))
            if failed is not None:
                raise FloatingPointError(_failure(failed, checkpoints.newest()))
            now = time.perf_counter()
            progress.count_time(now - lap, shares.ranks)
            lap = now
            is_last = progress.step == options.steps
            report.advance()
            trained.update_average(progress.step)

            # Metrics.
            if progress.step % options.log_every == 0 or is_last:
                row = window.close(lr=rate, grad_norm=trained.norm_value())
                report.write(row, progress.step)

            # A checkpoint; if a signal asked for a stop, this is the moment.
            if progress.step % options.checkpoint_every == 0 or is_last or stop_signal:
                progress.loss = checkpoint_loss.close(accelerator)
                objective.prepare_checkpoint()
                checkpoints.write(progress, trained.save, accelerator)
            if stop_signal and not is_last:
                raise Preempted(stop_signal, progress.step)

            # Something to look at, such as a panel.
            _show(trained, show, progress.step, options, accelerator)

    # The result: the average, if there is one, as a plain network.
    report.close()
    accelerator.wait_for_everyone()
    trained.finish()
    return progress


def _resume(checkpoints: Checkpoints, trained: TrainedNetwork) -> Progress:
    """Go on from the newest checkpoint, or begin; collective.

    Raises:
        ValueError: where ranks go on from different checkpoints.
    """
    progress = checkpoints.resume(trained.load)
    facts = {"the step of the newest checkpoint": progress.step}
    if trained.accelerator.num_processes > 1 and not trained.sharded:
        facts["the checksum of the weights there"] = weights_checksum(trained.weights)
    check_same(
        facts,
        trained.accelerator,
        "give all machines one disk for the runs, or copy rank 0's run directory to them",
    )
    return progress


def _micro_step(
    objective: Objective,
    trained: TrainedNetwork,
    batch: Batch,
    weight: float,
    options: TrainingOptions,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], Batch]:
    """Forward and backward of one micro-batch; the last one of a step changes the weights.

    Returns:
        The loss, the other metrics, and the batch on the device.
    """
    accelerator = trained.accelerator
    with accelerator.accumulate(trained.network):
        batch = to_device(batch, accelerator.device)
        # Under autocast the frozen networks round as the trained one does.
        with trained.computing():
            loss, terms = objective.loss(trained.network, batch)
        accelerator.backward(weight * loss)
        trained.step(options.max_norm)
    return loss, terms, batch


def _is_written(step: int, options: TrainingOptions) -> bool:
    """Whether something is made of the weights or the numbers after so many steps."""
    periods = [options.log_every, options.checkpoint_every, options.show_every]
    return step == options.steps or any(period and step % period == 0 for period in periods)


def _failure(failed: EndedStep, newest: Path | None) -> str:
    what = f"step {failed.step}: {failed.problem()}"
    if newest is None:
        return f"{what}; there is no checkpoint yet"
    return f"{what}; {newest} holds the last good weights"


def _show(
    trained: TrainedNetwork,
    show: Callable[[torch.nn.Module, int], None],
    step: int,
    options: TrainingOptions,
    accelerator: Accelerator,
) -> None:
    """Call `show` on the main process, at a step that has something to show.

    The others wait, and training's random numbers stay.
    """
    if not options.show_every or not step or step % options.show_every:
        return
    network = trained.snapshot()
    if accelerator.is_main_process:
        with torch.random.fork_rng():
            show(network, step)
    accelerator.wait_for_everyone()


class _Report:
    """What the main process tells of a run: progress bar, metrics.jsonl, and a function `log`."""

    def __init__(
        self,
        run_dir: Path,
        options: TrainingOptions,
        progress: Progress,
        accelerator: Accelerator,
        log: Callable[[Metrics, int], None],
    ) -> None:
        self.log = log
        self.file = None
        if accelerator.is_main_process:
            self.file = MetricsFile(run_dir / "metrics.jsonl", progress.step)
        self.bar = LivingBar(
            total=options.steps,
            initial=progress.step,
            unit="step",
            disable=self.file is None,
            mininterval=2,
        )

    def advance(self) -> None:
        self.bar.update()

    def write(self, row: Metrics, step: int) -> None:
        shown = {name: f"{row[name]:.4g}" for name in IN_PROGRESS_BAR if name in row}
        self.bar.set_postfix(shown)
        if self.file is not None:
            self.file.append({"step": step, **row})
            self.log(row, step)

    def close(self) -> None:
        self.bar.close()


class _MeanLoss:
    """The mean loss since the last checkpoint, over all ranks."""

    def __init__(self) -> None:
        self.sum = torch.tensor(0.0)
        self.count = 0

    def add(self, loss: torch.Tensor) -> None:
        self.sum = self.sum.to(loss.device) + loss.detach().float()
        self.count += 1

    def close(self, accelerator: Accelerator) -> float:
        own = torch.stack([self.sum, torch.full_like(self.sum, self.count)])
        total, count = accelerator.reduce(own, "sum").tolist()
        self.sum = torch.zeros_like(self.sum)
        self.count = 0
        return total / count
