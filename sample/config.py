"""The sample stage's config: which anchor, over which lambdas, on which prompts, and how it is sampled."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.checks import choice, positive
from configs.tracking import TrackingConfig
from deradiff.files import slug
from deradiff.models.families import FAMILIES
from deradiff.models.family import SamplingDefaults
from deradiff.realignment.registry import (
    LABELS,
    MODES,
    NEEDS,
    manifest_mode,
    modes_with,
    unsupported_option,
)

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Sampler:
    """A scheduler of diffusers' or ours, and what it is told besides the base's own noise schedule. flow: it is for flow families."""

    scheduler: str
    options: tuple[tuple[str, Any], ...] = ()
    flow: bool = False


UNCLIPPED = (
    ("clip_sample", False),
)  # clipping is for pixels in [-1, 1], which latents leave, and would bend a linear step
SAMPLERS = {
    "ddim": Sampler("DDIMScheduler", UNCLIPPED),
    "ddpm": Sampler("DDPMScheduler", UNCLIPPED),
    "euler": Sampler("EulerDiscreteScheduler"),
    "euler_ancestral": Sampler("EulerAncestralDiscreteScheduler"),
    "dpmpp_2m": Sampler(
        "DPMSolverMultistepScheduler", (("algorithm_type", "dpmsolver++"), ("solver_order", 2))
    ),
    "dpmpp_2m_sde": Sampler(
        "DPMSolverMultistepScheduler", (("algorithm_type", "sde-dpmsolver++"), ("solver_order", 2))
    ),
    "flow_euler": Sampler(
        "FlowMatchEulerDiscreteScheduler", (("stochastic_sampling", False),), flow=True
    ),
    # diffusers' stochastic_sampling=True is left out: even an exact model's chain with it misses the model's distribution (docs/oracle.md)
    "flow_sde": Sampler("FlowMatchSDEScheduler", flow=True),
}


SHAPES = "shapes"
SAMPLING_DEFAULTS = {
    SHAPES: SamplingDefaults(steps=20, guidance_scale=2.5, batch_size=64),
    **{family.name: family.sampling for family in FAMILIES.values()},
}
"""How the shapes world and each family is sampled where the user does not say it."""


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
    prompts_limit: at most so many, evenly spaced over the list.
    mode, every, particles, trust_region, batched: see `deradiff.realign`; a run with particles above 1 calls its mode `particles`.
    sampler, steps, guidance_scale, batch_size: null takes the base's own defaults. height, width: pixels; null takes the model's.
    path_kl: false leaves it out where it costs an evaluation a step (exact: at lambda 1; weights: everywhere); null: in weights alone.
    eta: of DDIM, 0 (deterministic) to 1. dtype: null takes half precision on a GPU (bfloat16 for flow families) and float32 elsewhere.
    bake: a folder to write the one lambda to as plain weights, with a note of how far they are from mode exact on these prompts.
    name: the folder below runs/sample; null composes it from anchor, mode and sampler.
    """

    anchor: str = "???"
    lambdas: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    targets: list[float] = field(default_factory=list)
    prompts: Any = None
    prompts_limit: int | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    model: ModelConfig = field(default_factory=ModelConfig)
    mode: str = "exact"
    every: int = 4
    particles: int = 1
    trust_region: float | None = None
    batched: bool = False
    sampler: str | None = None
    eta: float = 0.0
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    dtype: str | None = None
    batch_size: int | None = None
    path_kl: bool | None = None
    bake: str | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    name: str | None = None
    runs: str = "runs"

    def __post_init__(self) -> None:
        choice("mode", self.mode, tuple(MODES))
        choice("sampler", self.sampler, (None, *SAMPLERS))
        choice("dtype", self.dtype, (None, *DTYPES))
        self._check_numbers()
        self._check_mode()
        self.lambdas = [abs(float(lam)) for lam in self.lambdas]  # abs: -0.0 is 0.0

    def _check_numbers(self) -> None:
        _distinct("lambdas", self.lambdas, "[0,0.25,0.5,1]")
        _distinct("seeds", self.seeds, "[0]")
        for lam in self.lambdas:
            if (
                isinstance(lam, bool)
                or not isinstance(lam, int | float)
                or not math.isfinite(lam)
                or lam < 0
            ):
                raise ValueError(
                    f"lambdas must be finite numbers of at least 0, and {lam!r} is not; give lambdas=[0,0.25,0.5,1]"
                )
        for target in self.targets:
            if not (math.isfinite(target) and target > 0):
                raise ValueError(
                    f"targets must be betas above 0, and {target!r} is not; give targets=[500,2000]"
                )
        for seed in self.seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
                raise ValueError(
                    f"seeds must be whole numbers of at least 0, and {seed!r} is not; give seeds=[0]"
                )
        if not 0 <= self.eta <= 1 or (self.eta and self.sampler != "ddim"):
            raise ValueError(
                f"eta belongs to sampler=ddim and lies in [0, 1]; it is {self.eta} with sampler={self.sampler}"
            )
        if self.guidance_scale is not None and not (
            math.isfinite(self.guidance_scale) and self.guidance_scale >= 0
        ):
            raise ValueError(
                f"guidance_scale must be a number of at least 0 (1: no guidance), not {self.guidance_scale}"
            )
        for key in ("steps", "batch_size", "every", "particles", "prompts_limit"):
            if (count := getattr(self, key)) is not None and count < 1:
                raise ValueError(f"{key} must be at least 1, not {count}")
        for key in ("height", "width"):
            if (side := getattr(self, key)) is not None and (side < 8 or side % 8):
                raise ValueError(f"{key} must be a multiple of 8 pixels, not {side}")

    def _check_mode(self) -> None:
        """Options of one mode beside another, which `realign` would refuse once the weights are there."""
        if self.trust_region is not None:
            positive("trust_region", self.trust_region)
        option = unsupported_option(self.mode, self.particles, self.batched, self.trust_region)
        if option:
            modes = " or ".join(f"mode={name}" for name in modes_with(option))
            value = str(getattr(self, option)).lower()
            raise ValueError(
                f"{option} {NEEDS[option]}: give {modes} with {option}={value}, not {self.mode}"
            )
        plain = self.mode == "exact" and self.particles == 1 and self.trust_region is None
        if self.bake and not (
            plain and len(self.lambdas) + len(self.targets) == 1 and self.lambdas != [0]
        ):
            raise ValueError(
                "bake writes the weights of one lambda, and compares them with mode=exact: give bake=<folder> lambdas=[0.5]"
            )

    @property
    def mode_name(self) -> str:
        """As the manifest has it."""
        return manifest_mode(self.mode, self.particles)

    @property
    def mode_setting(self) -> int | None:
        """The number that tells two runs of the mode apart, such as `every` of mode reuse."""
        setting = LABELS[self.mode_name].setting
        return getattr(self, setting) if setting else None

    def run_name(self) -> str:
        if self.name:
            return self.name
        path = Path(self.anchor)
        path = path.parent if path.name == "anchor" else path
        below_train = (
            path.parts[path.parts.index("train") + 1 :]
            if "train" in path.parts[:-1]
            else path.parts[-2:]
        )
        setting = "" if self.mode_setting is None else self.mode_setting
        parts = [slug("-".join(below_train)), f"{self.mode_name}{setting}", *self._sampler_name()]
        parts += [
            f"{word}{value:g}"
            for word, value in (
                ("steps", self.steps),
                ("guidance", self.guidance_scale),
                ("trust", self.trust_region),
            )
            if value is not None
        ]
        if self.prompts not in (
            None,
            [],
            "shapes",
        ):  # other prompts are another run: added to one that is compared, they would spoil it
            parts.append(_prompts_name(self.prompts))
        if self.height or self.width:
            parts.append(f"{self.width or ''}x{self.height or ''}")
        return "-".join(parts)

    def _sampler_name(self) -> list[str]:
        """The sampler, also where it follows from the family that a local card or model.name tells; else it is not in the name."""
        card = Path(self.anchor) / "anchor.json"
        family = json.loads(card.read_text()).get("family") if card.is_file() else self.model.name
        sampler = self.sampler or (_default_sampler(family))
        return [sampler + (f"-eta{self.eta:g}" if self.eta else "")] if sampler else []


def _default_sampler(family: str | None) -> str | None:
    """The sampler of a family, or of the shapes world; None for an unknown one."""
    defaults = SAMPLING_DEFAULTS.get(family or "")
    return defaults.sampler if defaults else None


def _prompts_name(prompts: Any) -> str:
    """A file's or set's name; of a list a digest."""
    if isinstance(prompts, str):
        return slug(Path(prompts).stem)[:40]
    return "prompts-" + hashlib.sha256(repr(prompts).encode()).hexdigest()[:8]


def _distinct(key: str, values: Any, example: str) -> None:
    if not isinstance(values, list) or not values:
        raise ValueError(
            f"{key} must be a list of at least one number, not {values!r}; give {key}={example}"
        )
    twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
    if twice is not None:
        raise ValueError(f"{key} holds {twice} twice; give every one once")
