"""The data half of the train stage's config: where examples come from and how they are prepared."""

from __future__ import annotations

from dataclasses import dataclass

from configs.checks import choice, not_negative, positive

SOURCES = {  # source: does it give pairs? None: the table's own columns decide
    "table": None,
    "shapes_images": False,
    "shapes_pairs": True,
    "scored_pairs": True,
    "sampled_pairs": True,
}


@dataclass
class DataConfig:
    """source: `table` reads data.path (parquet, folder of captioned images, or hub id). `shapes_images` and `shapes_pairs` draw `count`
    rows of the shapes world, pairs labelled on `scorer` (vivid or crisp). `scored_pairs` lets a scorer label `count` pairs of data.path's
    images; `sampled_pairs` samples two pictures of each of `prompts` for `count` pairs first, with `pipeline` (null: model.base).
    temperature: of their labels' Bradley-Terry draw, in units of the scorer; 0: the higher score wins. steps, guidance_scale, batch_size:
    of that sampling. flip: mirror an example's pictures, all or none, every other time. max_broken: the share of rows that may hold broken
    pictures. streaming: read parquet where it lies. cache: encode once, below runs/cache. dry_run: count, show and estimate, and stop.
    """

    source: str = "table"
    path: str | None = None
    split: str = "train"
    revision: str | None = None
    limit: int | None = None
    count: int = 4000
    scorer: str = "vivid"
    scorer_checkpoint: str | None = None
    caption_dropout: float = 0.1
    flip: bool = False
    max_broken: float = 0.01
    prompts: str | None = None
    pipeline: str | None = None
    steps: int = 50
    guidance_scale: float = 7.5
    batch_size: int = 8
    temperature: float = 0.0
    dry_run: bool = False
    streaming: bool = False
    cache: bool = True
    workers: int = 0

    def __post_init__(self) -> None:
        choice("data.source", self.source, SOURCES)
        for key in ("count", "steps", "batch_size"):
            positive(f"data.{key}", getattr(self, key))
        for key in ("guidance_scale", "temperature"):
            not_negative(f"data.{key}", getattr(self, key))
        not_negative("data.workers", self.workers)
        if self.limit is not None:
            positive("data.limit", self.limit)
        if self.source == "shapes_pairs" and self.scorer not in ("vivid", "crisp"):
            raise ValueError(
                f"data.source=shapes_pairs is labelled by vivid or crisp, not {self.scorer!r}; other scorers take data=scored_pairs"
            )
        if self.source == "sampled_pairs":
            if not self.prompts:
                raise ValueError(
                    "data.prompts is missing; give a file of prompts, or a set that python -m sample knows"
                )
        elif not self.source.startswith("shapes") and not self.path:
            raise ValueError(
                "data.path is missing; give a parquet file, a folder of captioned images, or a hub data set such as org/name"
            )
        for key in ("caption_dropout", "max_broken"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"data.{key} must lie in [0, 1], not {getattr(self, key)}")
