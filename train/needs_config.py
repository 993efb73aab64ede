"""The config of `deradiff needs`: that of a training, and the machines that are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from configs.checks import choice, positive
from configs.settings import setting
from deradiff.models.gpus import COMPARED_GPUS, GPUS
from train.config import AUTO, TrainConfig


@dataclass
class ScaleConfig:
    """The machines that are compared."""

    cards: list[str] = setting(list(COMPARED_GPUS), "the GPUs: " + " | ".join(GPUS))
    prices: list[float] = setting(
        [], "US dollars of a GPU-hour on each of needs.cards; []: no costs"
    )
    mfu: float | None = setting(
        None,
        "share of a GPU's 16-bit peak that training reaches, repeated passes not counted; null: as "
        "measured on one H200, 0.11 for lora and 0.2 for full",
    )
    bandwidth: float = setting(
        12.5, "GB/s of the slowest link between two GPUs; 12.5: a network of 100 Gbit/s"
    )

    def __post_init__(self) -> None:
        positive("needs.bandwidth", self.bandwidth)
        if not self.cards:
            raise ValueError("needs.cards is empty: give at least one, as in needs.cards=[H200]")
        for card in self.cards:
            choice("needs.cards", card, GPUS)
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise ValueError(f"needs.mfu must lie in (0, 1], not {self.mfu}")
        if self.prices and len(self.prices) != len(self.cards):
            raise ValueError(
                f"needs.prices has {len(self.prices)} prices and needs.cards {len(self.cards)} "
                "cards: give one price for each card"
            )


@dataclass
class NeedsConfig(TrainConfig):
    """A training, and the machines that it may run on."""

    USUAL: ClassVar[tuple[str, ...]] = (
        "needs.cards",
        "needs.prices",
        "needs.mfu",
        "needs.bandwidth",
        "steps",
        "optim.pairs_per_step",
        "optim.batch_size",
        "model.gradient_checkpointing",
        "data.path",
    )
    needs: ScaleConfig = field(default_factory=ScaleConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optim.batch_size == AUTO:
            raise ValueError(
                "optim.batch_size=auto follows from one device, and here several are compared: "
                "give optim.batch_size=<number>"
            )
