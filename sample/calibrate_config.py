"""The config of `deradiff calibrate`: which anchors, on which pairs, and how precisely.

It imports nothing heavy: a mistake in a command is answered before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from configs.checks import at_most, check_seed, choice, positive
from configs.paths import AUTOENCODER, PIPELINE, anchor_path, check_anchor, check_path
from configs.settings import setting
from configs.tracking import TrackingConfig
from deradiff.command_line import command_of
from sample.config import DTYPES, ModelConfig, name_of_anchors

MOST_PAIRS = 1_000_000
"""More pairs than any set of preferences has."""

PAIRS = "a parquet file, a folder of pairs, or a data set of the hub such as org/name"

REWARDS = ("vivid", "crisp")


@dataclass
class CalibrateConfig:
    """One calibration."""

    USUAL: ClassVar[tuple[str, ...]] = (
        "anchor",
        "pairs",
        "count",
        "draws",
        "betas",
        "lams",
        "on_card",
        "name",
    )
    anchor: Any = setting(
        "???",
        f"what {command_of('train')} left, a folder, a file, or a hub id; [a,b] calibrates several",
    )
    pairs: str | None = setting(
        None,
        "preference pairs that no anchor was trained on: a parquet file, a folder or a data set of "
        "the hub; null: new pairs of the shapes world where it is the base",
    )
    split: str = setting("train", "the split of a data set of the hub")
    reward: str = setting("vivid", "that labels new pairs of the shapes world: vivid or crisp")
    count: int = setting(512, "pairs, at most")
    draws: int = setting(6, "timesteps and noises of each pair")
    batch_size: int = setting(8, "pairs whose images are evaluated at once")
    betas: list[float] = setting([], "betas of the table, besides the anchors' own; []: some")
    lams: list[float] = setting([], "lambdas of the table; []: 0 to 2")
    on_card: bool = setting(
        True, "write the result onto the anchor's card and into its README, where it is a folder"
    )
    seed: int = setting(0, "fixes the choice of pairs, timesteps and noise")
    model: ModelConfig = setting(ModelConfig(), "the reference")
    dtype: str | None = setting(
        None, "null: half on a GPU, float32 elsewhere; " + ", ".join(DTYPES)
    )
    read_pickled_tensors: bool = setting(
        False, "anchors may be pickles (.pth, .pt, .bin, .ckpt), of which only tensors are read"
    )
    tracking: TrackingConfig = setting(TrackingConfig(), "where numbers and images go")
    name: str | None = setting(
        None, "folder of the run below runs/calibrate; null: of the anchors and the pairs"
    )
    runs: str = setting("runs", "folder of all runs")

    def __post_init__(self) -> None:
        # Every anchor has one name.
        given = self.anchor if isinstance(self.anchor, list) else [self.anchor]
        if not given or not all(isinstance(one, str) and one.strip() for one in given):
            raise ValueError("anchor must be a path or hub id, or a list of these: anchor=[a,b]")
        self.anchor = [anchor_path(one, self.runs) for one in given]

        # Numbers.
        at_most("count", self.count, MOST_PAIRS)
        if self.count < 2:
            raise ValueError(f"count must be at least 2 pairs, not {self.count}: give count=512")
        for key in ("draws", "batch_size"):
            positive(key, getattr(self, key))
        check_seed("seed", self.seed)
        for beta in self.betas:
            positive("a beta of betas", beta)
        choice("reward", self.reward, REWARDS)
        if self.dtype is not None:
            choice("dtype", self.dtype, DTYPES)

    @property
    def anchors(self) -> list[str]:
        """The anchors, mostly one."""
        return list(self.anchor)

    def run_name(self) -> str:
        """The name of the run directory: a function of the config, never of the clock."""
        return self.name or name_of_anchors(self.anchors)

    def check_paths(self) -> None:
        """Refuse local paths where nothing is.

        Raises:
            ValueError: with what to type.
        """
        for anchor in self.anchors:
            check_anchor(anchor, self.runs)
        check_path("pairs", self.pairs, PAIRS, self.runs)
        check_path("model.base", self.model.base, PIPELINE, self.runs)
        check_path("model.vae", self.model.vae, AUTOENCODER, self.runs)
