"""The sample stage's config: which anchor, over which lambdas, on which prompts, and how it is sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.checks import choice
from configs.tracking import TrackingConfig
from deradiff.runs import slug

MODES = ("exact", "weights")
DTYPES = ("float32", "float16", "bfloat16")
SAMPLERS = {  # name: diffusers' scheduler
    "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler",
}  # fmt: skip


@dataclass(frozen=True)
class Defaults:
    """What is meant where steps, guidance_scale or batch_size is null: the paper's evaluation, and shapes.md's for the embedded world."""

    steps: int
    guidance_scale: float
    batch_size: int


DEFAULTS = {"sd15": Defaults(50, 7.5, 8), "sdxl": Defaults(50, 5.0, 4), "shapes": Defaults(20, 2.5, 64)}


@dataclass
class ModelConfig:
    """The reference. base: a pipeline folder, hub id or `asset:...`; null takes the one that the anchor's card names.

    vae: an autoencoder that takes the place of the base's own. resolution: side in pixels where height or width is null.
    """

    name: str | None = None
    base: str | None = None
    revision: str | None = None
    vae: str | None = None
    resolution: int | None = None


@dataclass
class SampleConfig:
    """One run. anchor: what `python -m train` left, or a hub id. lambdas: 0 is the reference, 1 the anchor, as strong as was trained.

    targets: betas to imitate, for an anchor whose card knows its own: each adds lambda = beta / target.
    prompts: see `deradiff.data.prompts`; null: the shapes world's held-out captions where the base is that world's.
    steps, guidance_scale, batch_size: null takes `DEFAULTS` of the base. height, width: pixels; null takes the model's.
    path_kl: false leaves it out where it costs an evaluation a step (exact: at lambda 1; weights: everywhere).
    eta: of DDIM, 0 (deterministic) to 1. dtype: null takes float16 on a GPU and float32 elsewhere.
    name: the folder below runs/sample; null composes it from anchor, mode and sampler.
    """

    anchor: str = "???"
    lambdas: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    targets: list[float] = field(default_factory=list)
    prompts: Any = None
    seeds: list[int] = field(default_factory=lambda: [0])
    model: ModelConfig = field(default_factory=ModelConfig)
    mode: str = "exact"
    sampler: str = "euler_ancestral"
    eta: float = 0.0
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    dtype: str | None = None
    batch_size: int | None = None
    path_kl: bool = True
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    name: str | None = None
    runs: str = "runs"

    def __post_init__(self) -> None:
        choice("mode", self.mode, MODES)
        choice("sampler", self.sampler, SAMPLERS)
        choice("dtype", self.dtype, (None, *DTYPES))
        _distinct("lambdas", self.lambdas, "[0,0.25,0.5,1]")
        _distinct("seeds", self.seeds, "[0]")
        for lam in self.lambdas:
            if isinstance(lam, bool) or not isinstance(lam, int | float) or not math.isfinite(lam) or lam < 0:
                raise ValueError(f"lambdas must be finite numbers of at least 0, and {lam!r} is not; give lambdas=[0,0.25,0.5,1]")
        for target in self.targets:
            if not (math.isfinite(target) and target > 0):
                raise ValueError(f"targets must be betas above 0, and {target!r} is not; give targets=[500,2000]")
        for seed in self.seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
                raise ValueError(f"seeds must be whole numbers of at least 0, and {seed!r} is not; give seeds=[0]")
        if not 0 <= self.eta <= 1 or (self.eta and self.sampler != "ddim"):
            raise ValueError(f"eta belongs to sampler=ddim and lies in [0, 1]; it is {self.eta} with sampler={self.sampler}")
        if self.guidance_scale is not None and not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"guidance_scale must be a number of at least 0 (1: no guidance), not {self.guidance_scale}")
        for key in ("steps", "batch_size"):
            if (count := getattr(self, key)) is not None and count < 1:
                raise ValueError(f"{key} must be at least 1, not {count}")
        for key in ("height", "width"):
            if (side := getattr(self, key)) is not None and (side < 8 or side % 8):
                raise ValueError(f"{key} must be a multiple of 8 pixels, not {side}")
        self.lambdas = [abs(float(lam)) for lam in self.lambdas]  # abs: -0.0 is 0.0

    def run_name(self) -> str:
        if self.name:
            return self.name
        path = Path(self.anchor)
        path = path.parent if path.name == "anchor" else path
        below_train = path.parts[path.parts.index("train") + 1 :] if "train" in path.parts[:-1] else path.parts[-2:]
        parts = [slug("-".join(below_train)), self.mode, self.sampler + (f"-eta{self.eta:g}" if self.eta else "")]
        parts += [f"{key}{value:g}" for key, value in (("steps", self.steps), ("guidance", self.guidance_scale)) if value is not None]
        if self.height or self.width:
            parts.append(f"{self.width or ''}x{self.height or ''}")
        return "-".join(parts)


def _distinct(key: str, values: Any, example: str) -> None:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key} must be a list of at least one number, not {values!r}; give {key}={example}")
    twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
    if twice is not None:
        raise ValueError(f"{key} holds {twice} twice; give every one once")
