"""A run of the train stage at SD1.5's real size, in a process of its own, and its peaks of memory.

`python -m tests.support.measured_run FOLDER METHOD OPTIMIZER` prints them and the estimate as JSON,
in bytes without those of the libraries. The weights are random.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.random_pipelines import PUBLISHED, random_pipeline, write_noise_pairs
from benchmarks.train import forget_peak, peak_memory
from deradiff.data.cache import Cache
from tests.support.tiny_pipelines import save_tiny
from tests.support.train_runs import go, small_run
from train import stage
from train.build import base_model
from train.config import DataConfig, ModelConfig, PanelConfig, TrainConfig
from train.estimate import estimate

CPU = torch.device("cpu")
CAPTIONS = ("a red circle", "a blue square")
PAIRS = 4
RESOLUTION = 256


class Peaks:
    """The most memory of each phase of a run.

    Attributes:
        found: bytes by phase.
        before: bytes of the process before the run, which do not count.
    """

    def __init__(self) -> None:
        forget_peak(CPU)
        self.before = peak_memory(CPU)
        self.found: dict[str, float] = {}
        self.phases = ["loading"]

    def _close(self) -> None:
        """Note the peak of the phase until now."""
        phase = self.phases[-1]
        self.found[phase] = max(self.found.get(phase, 0.0), peak_memory(CPU) - self.before)
        forget_peak(CPU)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase, possibly within another."""
        self._close()
        self.phases.append(name)
        try:
            yield
        finally:
            self._close()
            self.phases.pop()

    def measure(self, owner: object, function: str, name: str) -> None:
        """Replace a function by one whose calls are a phase."""
        original = getattr(owner, function)

        def measured(*args: object, **kwargs: object) -> object:
            with self.phase(name):
                return original(*args, **kwargs)

        setattr(owner, function, measured)


def write_base(folder: Path) -> Path:
    """SD1.5 in its published size, in float16."""
    size = PUBLISHED["sd15"]
    pipe = random_pipeline(size, CAPTIONS, RESOLUTION, CPU.type, torch.float16)
    pipe.save_pretrained(folder)
    return folder


def config_of(folder: Path, base: Path, method: str, optimizer: str) -> TrainConfig:
    """Two steps of two micro-batches of a pair."""
    pairs = folder / "pairs.parquet"
    if not pairs.is_file():
        write_noise_pairs(pairs, PAIRS, RESOLUTION, CAPTIONS)
    small = small_run(base, folder / "runs")
    return replace(
        small,
        model=ModelConfig(name=base.name, base=str(base), resolution=RESOLUTION),
        finetune=replace(small.finetune, method=method, rank=16, alpha=16),
        data=DataConfig(source="table", path=str(pairs)),
        optim=replace(small.optim, name=optimizer, lr=1e-6, pairs_per_step=2, batch_size=1),
        panel=PanelConfig(every=0),
        steps=2,
    )


def main() -> None:
    """Run, and print the peaks beside the estimate."""
    # The libraries' own memory: that of a process that has trained a tiny model.
    folder, method, optimizer = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    tiny = save_tiny("sd15", folder / f"tiny-{method}")
    go(config_of(folder, tiny, method, optimizer))

    # The estimate, which loads nothing, and then the run.
    base = folder / "base"
    config = config_of(folder, base if base.is_dir() else write_base(base), method, optimizer)
    expected = estimate(config, base_model(config), PAIRS)
    peaks = Peaks()
    peaks.measure(Cache, "build", "caching")
    peaks.measure(stage, "train", "training")
    go(config)
    counted = {name: getattr(expected, name) for name in ("caching", "training")}
    print(json.dumps({"measured": peaks.found, "counted": counted, "parts": asdict(expected)}))


if __name__ == "__main__":
    main()
