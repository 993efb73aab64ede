"""What the checks of one group share: the device, the data, its cache and the random pipelines."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.rows import Card
from benchmarks.gpu.sizes import SIZES, Work
from benchmarks.random_pipelines import SCHEDULE, random_pipeline, write_noise_pairs
from benchmarks.sample import ANCHORS, Stopwatch, embeddings, parse_arguments
from benchmarks.train import CAPTIONS, Materials
from deradiff.data.cache import Cache
from deradiff.data.pairs import Pairs
from deradiff.models.gpus import peak_tflops

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""By the name that accelerate has for them."""

CACHE = "cache"
"""The folder of the cache that trainings read."""

FLAGS = "torch.use_deterministic_algorithms(True), cudnn.benchmark off, :4096:8 for cuBLAS"
"""What is set where bits are compared."""


class CannotRun(Exception):
    """A check that cannot run here; the message says why."""


@contextmanager
def deterministic() -> Iterator[None]:
    """Within the block an operation on the same input gives the same bits; see FLAGS."""
    before = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


class Bench:
    """One network in one precision on one device.

    Args:
        group: the network and the precision, such as `sdxl bf16`.
        device: `cuda` or `cpu`.
        size: a key of SIZES.
        folder: for data, caches and runs of this group.
    """

    def __init__(self, group: str, device: str, size: str, folder: Path) -> None:
        self.group = group
        self.network, self.precision = group.split()
        self.dtype = PRECISIONS[self.precision]
        self.device = torch.device(device)
        self.size_name = size
        self.size = SIZES[size]
        self.work: Work = self.size.works[self.network]
        self.folder = folder
        self._stopwatch: Stopwatch | None = None
        folder.mkdir(parents=True, exist_ok=True)

    # The card

    @cached_property
    def card(self) -> Card:
        """The device, with the rate that large matrix products reach on it."""
        side = self.size.matrix
        left, right = (
            torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2)
        )
        for _ in range(3):
            left @ right
        products = 20
        seconds = self.seconds(lambda: [left @ right for _ in range(products)])
        rate = products * 2 * side**3 / seconds
        if self.device.type == "cpu":
            return Card("cpu", 0.0, rate, None)
        name = torch.cuda.get_device_name()
        peak = peak_tflops(name)
        memory = torch.cuda.get_device_properties(0).total_memory
        return Card(name, memory, rate, None if peak is None else peak * 1e12)

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long `work` takes, by the clock."""
        self.synchronise()
        start = time.perf_counter()
        work()
        self.synchronise()
        return time.perf_counter() - start

    @property
    def profiles(self) -> bool:
        """Whether it is measured how busy the GPU is: in one precision, because it takes time."""
        return self.device.type == "cuda" and self.precision == "bf16"

    def busy(self, work: Callable[[], Any]) -> float | None:
        """The share of the time of `work` in which the GPU computes; None where it is unknown."""
        if not self.profiles:
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            # Not the time in which the profiler starts and ends.
            seconds = self.seconds(work)
        return busy_seconds(profiler) / seconds

    # Training

    @cached_property
    def data(self) -> Pairs:
        """Pairs of noise images."""
        file = self.folder / "pairs.parquet"
        if not file.exists():
            write_noise_pairs(file, self.size.data, self.work.resolution, CAPTIONS)
        return Pairs(str(file))

    def pipeline(self, denoiser: bool = True, encoders: bool = True) -> Any:
        """A new random pipeline, made on the device; always of the same weights."""
        return random_pipeline(
            self.work.pipeline,
            CAPTIONS,
            self.work.resolution,
            self.device.type,
            self.dtype,
            denoiser,
            encoders,
        )

    def open_cache(self, name: str = CACHE) -> Cache:
        """A cache of the data, which may have to be built.

        Args:
            name: of its folder.
        """
        return Cache(self.folder / name, self.group, self.data, self.work.resolution)

    def full_cache(self) -> Cache:
        """The cache that trainings read, complete."""
        cache = self.open_cache()
        cache.build(lambda: self.pipeline(denoiser=False), progress=False)
        return cache

    def materials(self) -> Materials:
        """What a variant of training is made from."""
        return Materials(
            self.folder,
            self.data,
            self.work.resolution,
            lambda encoders: self.pipeline(encoders=encoders),
            self.full_cache,
            self.work.checkpointing,
        )

    # Sampling

    def stopwatch(self, anchor: str, images: int) -> Stopwatch:
        """The pipeline whose calls are timed.

        A full anchor is on the device only while it is asked for.

        Args:
            anchor: a kind of anchor that is there; `plain`: none.
            images: of a batch.
        """
        if self._stopwatch is None:
            self._stopwatch = self._new_stopwatch()
        watch = self._stopwatch
        if anchor != "full":
            watch.anchors.pop("full", None)
        if anchor in ANCHORS and anchor not in watch.anchors:
            watch.anchors[anchor] = ANCHORS[anchor](watch.pipe, self.folder)
        if watch.args.batch != images:
            watch.args.batch = images
            watch.prompts = embeddings(watch.pipe, images)
        return watch

    def _new_stopwatch(self) -> Stopwatch:
        """One around a denoiser alone, without an anchor."""
        pipe = self.pipeline(encoders=False)
        pipe.register_modules(
            vae=None, scheduler=diffusers.EulerAncestralDiscreteScheduler(**SCHEDULE)
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.eval().requires_grad_(False)
        words = [f"--device={self.device.type}", f"--pixels={self.work.resolution}"]
        words += [f"--steps={self.size.sampler_steps}", "--batch=1"]
        return Stopwatch(parse_arguments(words), self.folder, (), pipe)

    def forget_pipeline(self) -> None:
        """Let the pipeline of `stopwatch` go."""
        self._stopwatch = None
        gc.collect()


def busy_seconds(profiler: Any) -> float:
    """Seconds of a profile in which the GPU computed."""
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
