"""Small runs of the train stage, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.state import AcceleratorState

from configs.tracking import TrackingConfig
from train.config import (
    DataConfig,
    DPOConfig,
    FinetuneConfig,
    ModelConfig,
    OptimConfig,
    PanelConfig,
    TrainConfig,
)
from train.stage import run


def small_run(base: Path, runs: Path) -> TrainConfig:
    """Three steps of Diffusion-DPO with a LoRA on a tiny base model and twelve pairs of shapes."""
    return TrainConfig(
        model=ModelConfig(name="x", base=str(base), resolution=64),
        data=DataConfig(source="shapes_pairs", count=12),
        optim=OptimConfig(lr=1e-3, per_pair=False, pairs_per_step=4, batch_size=2),
        dpo=DPOConfig(beta=500.0),
        finetune=FinetuneConfig(rank=4, alpha=8),
        panel=PanelConfig(every=0),
        tracking=TrackingConfig(kind="none"),
        steps=3,
        log_every=1,
        checkpoint_every=2,
        runs=str(runs),
        cpu=True,
    )


def go(config: TrainConfig) -> Path:
    """Run the stage as `python -m train` does; returns the folder of what was trained."""
    with own_process():
        return run(config, Path(config.runs) / "train" / config.run_name())


@contextmanager
def own_process() -> Iterator[None]:
    """As in a process of its own: in no precision of another run's, and leaving none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
