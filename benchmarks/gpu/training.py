"""The checks of training: the cache, the pace of a step, resuming, two processes on one GPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from safetensors.torch import load_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import CACHE, Bench, CannotRun, busy_seconds, deterministic
from benchmarks.gpu.rows import Finding
from benchmarks.train import forget_peak, make_objective, peak_memory
from deradiff.data.pairs import Examples
from deradiff.data.reference_errors import ReferenceErrors
from deradiff.models.flops import dpo_step_flops
from deradiff.training.checkpoints import Checkpoints
from deradiff.training.loop import train
from deradiff.training.meters import Metrics
from deradiff.training.options import TrainingOptions
from deradiff.training.preemption import Preempted

NEVER = 10**9
"""Steps between two checkpoints where there is none on the way."""

LEARNING_RATE = 1e-5

RESUMED_STEPS = 3
"""Of the run that is interrupted after the first."""

RANKS = 2
RANK_STEPS = 2
RANK_SECONDS = 120
"""After which a process of a rank is given up."""

CLOSE = 1e-2
"""What two ways to train may differ by, as a share of what the weights have changed."""

FIRST_BETA = "first beta"
KNOWN = "errors known"
COMPILED = "compiled"
VARIANTS = {
    "published": "published",
    FIRST_BETA: "errors",
    KNOWN: "errors",
    COMPILED: "compile",
}
"""The variants that are timed, by their name in the table: what `benchmarks.train` calls each."""


def card(bench: Bench) -> Finding:
    """The rate of large matrix products, which MFU is a share of."""
    found = bench.card
    return Finding(note=f"{found.rate / 1e12:.3g} TFLOP/s in bf16", card=found)


def cache(bench: Bench) -> Finding:
    """Build the cache of latents and texts: images a second and memory."""
    pipe = bench.pipeline(denoiser=False)

    # The first one warms up, and is what trainings read. It need not be built again.
    bench.open_cache().build(lambda: pipe, progress=False)
    again = bench.open_cache(f"{CACHE}-again")
    shutil.rmtree(again.folder, ignore_errors=True)
    forget_peak(bench.device)
    seconds = bench.seconds(lambda: again.build(lambda: pipe, progress=False))
    images = 2 * len(bench.data)
    return Finding(
        seconds / images,
        "image",
        encoded=1,
        memory=peak_memory(bench.device),
        note=f"{images / seconds:.3g} images/s, decoding and texts too",
    )


# The pace of a step


def pace(bench: Bench, method: str, name: str) -> Finding:
    """Train a few steps in the loop of the train stage.

    Args:
        bench: what is trained.
        method: `lora` or `full`.
        name: a key of VARIANTS.
    """
    _check_precision(bench)
    materials = bench.materials()
    work = bench.work
    folder = _fresh(bench.folder / f"pace-{method}-{name}")
    if name == FIRST_BETA:
        # What an earlier run knows of the reference's errors would make it a later beta.
        shutil.rmtree(ReferenceErrors(bench.folder, method).folder, ignore_errors=True)
    bench.full_cache()
    forget_peak(bench.device)
    objective = make_objective(VARIANTS[name], method, materials, work.pairs)
    if name in (KNOWN, COMPILED) and not objective.stored_reference:
        raise CannotRun("the row of the first beta has left no errors of the reference")

    # No checkpoint is written: the weights of SDXL with their optimiser take 31 GB.
    options = _options(work.steps, work.pairs_per_step, work.pairs_per_step)
    options.cuda_graphs = name == COMPILED
    times = _StepTimes(bench, options)
    with patch.object(Checkpoints, "write"):
        train(objective, Examples(bench.data, 0), options, folder, _accelerator(bench), times.log)
    stored = objective.stored_reference
    return Finding(
        times.seconds,
        f"step of {work.pairs_per_step} pairs",
        forwards=dpo_step_flops(1.0, work.pairs_per_step, method, stored_reference=stored),
        beside="" if name == "published" else f"train {method}: published",
        busy=times.busy,
        memory=peak_memory(bench.device),
        note=f"{work.pairs_per_step / times.seconds:.3g} pairs/s; first step {times.first:.1f} s",
    )


class _StepTimes:
    """How long steps take, from the metrics of each. The first one warms up.

    Args:
        bench: what is trained.
        options: of the run.

    Attributes:
        busy: the share of the last step in which the GPU computed; None where it is unknown.
    """

    def __init__(self, bench: Bench, options: TrainingOptions) -> None:
        self.options = options
        self.busy: float | None = None
        self._times: list[float] = []
        self._start = 0.0
        self._profiler: Any = None
        if bench.profiles:
            self._profiler = profile(activities=[ProfilerActivity.CUDA])

    def log(self, metrics: Metrics, step: int) -> None:
        """What the loop calls with each step's metrics, which it has waited for."""
        if self._profiler and step == self.options.steps:
            # The clock of the loop ran while the profiler started.
            seconds = time.perf_counter() - self._start
            self._profiler.stop()
            self.busy = busy_seconds(self._profiler) / seconds
            return
        self._times.append(self.options.pairs_per_step / metrics["pairs_per_second"])
        if self._profiler and step == self.options.steps - 1:
            self._profiler.start()
            self._start = time.perf_counter()

    @property
    def first(self) -> float:
        """Seconds of the first step, which warms up or compiles."""
        return self._times[0]

    @property
    def seconds(self) -> float:
        """The median of the steps after the first one."""
        return statistics.median(self._times[1:])


def _check_precision(bench: Bench) -> None:
    """Raise CannotRun where accelerate does not train in the bench's precision."""
    if bench.precision == "fp16" and bench.device.type == "cpu":
        raise CannotRun("accelerate trains in fp16 on GPUs only")


def _options(steps: int, pairs_per_step: int, batch_size: int) -> TrainingOptions:
    """Options with which each step is logged, and none but the last is kept."""
    return TrainingOptions(
        steps=steps,
        pairs_per_step=pairs_per_step,
        batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        log_every=1,
        checkpoint_every=NEVER,
        keep_last=1,
    )


def _accelerator(bench: Bench) -> Accelerator:
    """As the train stage makes it; several ranks on one GPU talk through gloo."""
    handlers: list[Any] = []
    if "RANK" in os.environ:
        patience = timedelta(seconds=RANK_SECONDS)
        handlers.append(InitProcessGroupKwargs(backend="gloo", timeout=patience))
    return Accelerator(
        cpu=bench.device.type == "cpu",
        mixed_precision=bench.precision,
        kwargs_handlers=handlers,
    )


def _fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# The same weights


def resume(bench: Bench, method: str) -> Finding:
    """A run that a signal interrupts, and that goes on, ends with an undisturbed one's weights.

    Args:
        bench: what is trained.
        method: `lora` or `full`.
    """
    _check_precision(bench)
    note = f"interrupted after step 1 of {RESUMED_STEPS}, and undisturbed: the same bits"
    if method == "full":
        # The checkpoint of SD1.5 with its optimiser takes 10 GB, that of SDXL 31.
        bench = Bench(bench.group, bench.device.type, "tiny", bench.folder / "tiny")
        note += "; a tiny network, because a checkpoint of this one is too large"
    options = _options(RESUMED_STEPS, 1, 1)
    whole_folder = _fresh(bench.folder / f"whole-{method}")
    stopped_folder = _fresh(bench.folder / f"stopped-{method}")

    def interrupt(metrics: Metrics, step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    forget_peak(bench.device)
    with deterministic():
        before, whole = _trained(bench, method, options, whole_folder)
        shutil.rmtree(whole_folder)
        try:
            _trained(bench, method, options, stopped_folder, log=interrupt)
        except Preempted:
            _, resumed = _trained(bench, method, options, stopped_folder)
        else:
            return Finding(problem="the signal did not interrupt the run")
    shutil.rmtree(stopped_folder)

    problem = _unchanged(before, whole)
    different = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    if different:
        problem = f"{len(different)} of {len(whole)} weights differ, {different[0]} among them"
    return Finding(
        memory=peak_memory(bench.device),
        note=note,
        problem=problem,
    )


def _trained(
    bench: Bench,
    method: str,
    options: TrainingOptions,
    folder: Path,
    log: Callable[[Metrics, int], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train as the options say; returns the trained weights before and after, on the CPU."""
    variant = "adapter" if method == "lora" else "cache"
    objective = make_objective(variant, method, bench.materials(), bench.work.pairs)
    before = _weights(objective.network)
    train(
        objective,
        Examples(bench.data, 0),
        options,
        folder,
        _accelerator(bench),
        log or _ignore,
    )
    return before, _weights(objective.network)


def _ignore(metrics: Metrics, step: int) -> None:
    """Metrics that nobody waits for."""


def _weights(network: Any) -> dict[str, Tensor]:
    """Copies of the trained weights on the CPU."""
    weights = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def _unchanged(before: dict[str, Tensor], after: dict[str, Tensor]) -> str:
    """What is wrong where training has changed no weight, or made one that is not finite."""
    if not all(bool(tensor.isfinite().all()) for tensor in after.values()):
        return "a trained weight is not finite"
    if all(torch.equal(before[name], after[name]) for name in after):
        return "training has changed no weight"
    return ""


def two_processes(bench: Bench) -> Finding:
    """Two ranks on one device train what one process does."""
    _check_precision(bench)
    if bench.device.type == "cuda" and not torch.distributed.is_gloo_available():
        raise CannotRun("torch has no gloo here, and NCCL takes one process a GPU")
    bench.full_cache()

    # One process.
    with deterministic():
        folder = _fresh(bench.folder / "one-process")
        before, alone = _trained(bench, "lora", _options(RANK_STEPS, RANKS, 1), folder)
    forget_peak(bench.device)

    # Two, which leave a checkpoint.
    folder = _fresh(bench.folder / "two-processes")
    _run_ranks(bench, folder)
    newest = Checkpoints(folder, keep_last=1).newest()
    if newest is None:
        return Finding(problem="two processes have left no checkpoint")
    together = load_file(newest / "weights.safetensors")

    # How far they are from each other, in what training has changed.
    change = _norm({name: alone[name] - before[name] for name in alone})
    difference = _norm({name: alone[name] - together[name] for name in alone})
    same = all(torch.equal(alone[name], together[name]) for name in alone)
    found = "the same bits" if same else f"{difference / change:.1e} of the change apart"
    problem = _unchanged(before, alone)
    if not problem and difference > CLOSE * change:
        problem = found
    return Finding(
        note=f"{RANKS} ranks over gloo, and one process that accumulates: {found}", problem=problem
    )


def _norm(tensors: dict[str, Tensor]) -> float:
    return float(sum(float(tensor.float().square().sum()) for tensor in tensors.values())) ** 0.5


def _run_ranks(bench: Bench, folder: Path) -> None:
    """Run the processes of all ranks on the same device, and wait for them.

    Raises:
        RuntimeError: where one fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [bench.group, bench.device.type, bench.size_name, str(bench.folder), str(folder)]
    shared = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # The same local rank is the same GPU.
    shared |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(RANKS)}
    processes = []
    for rank in range(RANKS):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.training", json.dumps(arguments)],
                env=os.environ | shared | {"RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        for process in processes:
            _, errors = process.communicate(timeout=RANK_SECONDS)
            if process.returncode:
                last = errors.strip().splitlines()[-1:]
                raise RuntimeError(f"a rank ended with status {process.returncode}: {last}")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    """Be one rank of `two_processes`; the argument is a JSON list."""
    group, device, size, folder, run_dir = json.loads(sys.argv[1])
    bench = Bench(group, device, size, Path(folder))
    with deterministic():
        _trained(bench, "lora", _options(RANK_STEPS, RANKS, 1), Path(run_dir))


if __name__ == "__main__":
    main()
