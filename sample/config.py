"""The sample stage's config: which anchor, over which lambdas, on which prompts, and how.

It imports nothing heavy: a mistake in a command is answered before torch is loaded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from configs.checks import at_most, check_seed, choice, positive
from configs.paths import (
    ANCHOR,
    AUTOENCODER,
    CARD,
    PIPELINE,
    anchor_path,
    check_anchor,
    check_path,
    check_prompts,
)
from configs.settings import setting
from configs.tracking import TrackingConfig
from deradiff.anchors.beta_maps import MAPS, PAPER
from deradiff.command_line import command_of
from deradiff.files import slug
from deradiff.method.samplers import SAMPLERS
from deradiff.models.families import FAMILIES
from deradiff.models.family import SamplingDefaults
from deradiff.realignment.registry import (
    BRANCHES,
    LABELS,
    MEMORY,
    MODES,
    NEEDS,
    manifest_mode,
    modes_with,
    unsupported_option,
)
from deradiff.text_files import read_json

LARGEST_LAM = 1e6
LARGEST_SIDE = 8192  # pixels: larger images are not read
ROUNDING = 1e-9
DTYPES = ("float32", "float16", "bfloat16")
SHAPES = "shapes"

SAMPLING_DEFAULTS = {
    SHAPES: SamplingDefaults(steps=20, guidance_scale=2.5, batch_size=64),
    **{family.name: family.sampling for family in FAMILIES.values()},
}
"""How the shapes world and each family is sampled where the user does not say it."""


@dataclass
class ModelConfig:
    """The reference."""

    name: str | None = setting(None, "a family, or shapes: what the defaults are taken from")
    base: str | None = setting(
        None, "a pipeline folder, hub id or asset:...; null: the one that the anchor's card names"
    )
    revision: str | None = setting(None, "branch, tag or commit of the base on the hub")
    vae: str | None = setting(None, "an autoencoder in place of the base's own")
    resolution: int | None = setting(None, "side in pixels where height or width is null")


@dataclass
class SampleConfig:
    """One run of the sample stage."""

    USUAL: ClassVar[tuple[str, ...]] = (
        "anchor",
        "lambdas",
        "prompts",
        "prompts_limit",
        "seeds",
        "mode",
        "targets",
        "steps",
        "guidance_scale",
        "sampler",
        "name",
    )
    anchor: Any = setting(
        "???",
        f"what {command_of('train')} left, a folder, a file, or a hub id; [a,b] mixes several",
    )
    lambdas: Any = setting(
        None,
        "0 is the reference, 1 the anchor as strong as it was trained; null: 0 to 1 in quarters; "
        "of several anchors [[0.3,0.7],[0.5,0.5]]; null: from one to the other",
        is_list=True,
    )
    lam_schedule: list[Any] = setting(
        [],
        "what lambda is multiplied by in time: [1,0.2] from noise to image, or steps "
        "[[0,1],[0.5,0.2]]",
    )
    targets: list[float] = setting(
        [], "betas to imitate: each adds lambda = beta / target; the anchor's card must know beta"
    )
    targets_by: str = setting(
        PAPER,
        "from beta to lambda: paper (beta / target), or preference (the lowest held-out loss at "
        f"the target, which {command_of('calibrate')} writes onto the anchor's card)",
    )
    prompts: Any = setting(
        None,
        "a list, a file, or a named set; null: the shapes world's captions where it is the base",
    )
    prompts_limit: int | None = setting(
        None, "at most so many prompts, evenly spaced over the list"
    )
    seeds: list[int] = setting([0], "an image for each seed, prompt and lambda")
    model: ModelConfig = setting(ModelConfig(), "the reference")
    mode: str = setting("exact", "how the mixture is evaluated: " + ", ".join(MODES))
    every: int = setting(4, "mode reuse: evaluate both networks at every so many steps")
    particles: int = setting(1, "mode exact: chains an image, weighed and resampled; 1: none")
    trust_region: float | None = setting(
        None, "lambda above 1: nats of KL that the chain may go from the anchor's; null: any"
    )
    branch: str = setting(
        "both", "the branch of guidance that lambda acts on: " + ", ".join(BRANCHES)
    )
    read_pickled_tensors: bool = setting(
        False, "anchors may be pickles (.pth, .pt, .bin, .ckpt), of which only tensors are read"
    )
    batched: bool = setting(False, "a LoRA anchor's rows and the reference's as one batch")
    memory: str = setting(
        "auto",
        "high: the layers of a LoRA anchor get weights of their own, which a GPU runs faster; low: "
        "one network; auto: high on a GPU of which that takes less than half",
    )
    compile: bool = setting(
        False, "torch.compile the blocks that repeat in the network, and CUDA graphs on a GPU"
    )
    sampler: str | None = setting(None, "null: the model's default; " + ", ".join(SAMPLERS))
    eta: float = setting(0.0, "of DDIM: 0 (deterministic) to 1")
    steps: int | None = setting(None, "denoising steps; null: the model's default")
    guidance_scale: float | None = setting(
        None, "1: no guidance (Z-Image: 0); null: the model's default"
    )
    height: int | None = setting(None, "of an image, in pixels; null: the model's")
    width: int | None = setting(None, "in pixels, as height")
    dtype: str | None = setting(
        None, "float32, float16 or bfloat16; null: half precision on a GPU, float32 elsewhere"
    )
    batch_size: int | None = setting(None, "images sampled at once; null: the model's default")
    path_kl: bool | None = setting(
        None, "false: leave it out where it costs an evaluation a step; null: in mode weights alone"
    )
    bake: str | None = setting(
        None, "a folder: write the one lambda as plain weights, and compare them with mode exact"
    )
    tracking: TrackingConfig = setting(TrackingConfig(), "where numbers and images go")
    name: str | None = setting(
        None, "folder below runs/sample; null: composed from anchor, mode and sampler"
    )
    runs: str = setting("runs", "folder of all runs")

    def __post_init__(self) -> None:
        choice("mode", self.mode, MODES)
        choice("memory", self.memory, MEMORY)
        choice("branch", self.branch, BRANCHES)
        choice("sampler", self.sampler, (None, *SAMPLERS))
        choice("dtype", self.dtype, (None, *DTYPES))
        self._check_anchors()
        self._check_lambdas()
        self._check_lists()
        self._check_numbers()
        self._check_mode()
        self._check_schedule()
        self._check_bake()

    @property
    def anchors(self) -> list[str]:
        """The anchors, mostly one."""
        return self.anchor if isinstance(self.anchor, list) else [self.anchor]

    @property
    def points(self) -> list[tuple[float, ...]]:
        """Lambda of each anchor, for each of the lambdas."""
        return [tuple(lam) if isinstance(lam, list) else (lam,) for lam in self.lambdas]

    def _check_anchors(self) -> None:
        """Give every anchor its one name.

        Raises ValueError for anchors that are none, and for what is for one anchor alone.
        """
        for anchor in self.anchors:
            if not isinstance(anchor, str):
                raise ValueError(
                    f"anchor must be a folder, a file or a hub id, or a list of these, and "
                    f"{anchor!r} is none"
                )
        names = [anchor_path(anchor, self.runs) for anchor in self.anchors]
        _check_distinct("anchor", names, "[a,b]")
        self.anchor = names[0] if len(names) == 1 else names
        if len(names) == 1:
            return
        if self.targets_by != PAPER:
            raise ValueError("targets_by is for one anchor: remove it")
        if self.targets or self.bake or self.trust_region is not None:
            raise ValueError(
                "targets, bake and trust_region are for one anchor: remove these, or give "
                f"anchor={self.anchors[0]}"
            )
        if not MODES[self.mode].several_anchors:
            raise ValueError(f"mode={self.mode} is for one anchor: give mode=exact")

    def _check_lambdas(self) -> None:
        """Raises ValueError for lambdas that are none, or are not one for each anchor."""
        if self.lambdas is None:
            self.lambdas = self._default_lambdas()
        if _is_finite(self.lambdas):
            raise ValueError(f"lambdas is a list: give lambdas=[{self.lambdas:g}]")
        is_one = len(self.anchors) == 1
        example = "[0,0.25,0.5,1]" if is_one else "[[0.3,0.7],[0.5,0.5]]"
        _check_distinct("lambdas", self.lambdas, example)
        for lam in self.lambdas:
            if isinstance(lam, list) == is_one:
                kind = "numbers" if is_one else f"lists of {len(self.anchors)} numbers"
                raise ValueError(
                    f"lambdas of {len(self.anchors)} anchors are {kind}, and {lam!r} is not: give "
                    f"lambdas={example}"
                )
        for lams in self.points:
            self._check_point(lams, example)
        self.lambdas = [_floats(lam) for lam in self.lambdas]

    def _check_point(self, lams: tuple[float, ...], example: str) -> None:
        """Raises ValueError for lambdas of the anchors that cannot be sampled together.

        Args:
            lams: one for each anchor.
            example: what a message shows.
        """
        if len(lams) != len(self.anchors):
            raise ValueError(
                f"there are {len(self.anchors)} anchors and {len(lams)} lambdas in {list(lams)}: "
                f"give lambdas={example}"
            )
        for lam in lams:
            if not _is_finite(lam) or abs(lam) > LARGEST_LAM:
                raise ValueError(
                    f"lambdas must be numbers of at most {LARGEST_LAM:g} on either side of 0, and "
                    f"{lam!r} is not; give lambdas={example}"
                )
        # Lambdas that people type add up to 1 but for a rounding.
        if self.mode == "sampled" and (min(lams) < 0 or sum(lams) > 1 + ROUNDING):
            raise ValueError(
                "mode=sampled takes lambdas as probabilities, from 0 to 1 in sum, not "
                f"{sum(lams):g}: give mode=exact"
            )

    def _default_lambdas(self) -> list[Any]:
        """Of one anchor 0 to 1 in quarters; of two the reference, and from one to the other."""
        quarters = [0.0, 0.25, 0.5, 0.75, 1.0]
        if len(self.anchors) == 1:
            return quarters
        if len(self.anchors) > 2:
            raise ValueError(
                f"lambdas are missing: of {len(self.anchors)} anchors give lists of as many, such "
                f"as lambdas=[{[1 / len(self.anchors)] * len(self.anchors)}]"
            )
        return [[0.0, 0.0], *([1 - share, share] for share in quarters)]

    def _check_lists(self) -> None:
        """Raises ValueError for targets or seeds that are not what they should be."""
        _check_distinct("seeds", self.seeds, "[0]")
        choice("targets_by", self.targets_by, MAPS)
        for target in self.targets:
            if not (math.isfinite(target) and target > 0):
                raise ValueError(
                    f"targets must be betas above 0, and {target!r} is not; give targets=[500,2000]"
                )
        for seed in self.seeds:
            check_seed("a seed of seeds", seed)

    def _check_numbers(self) -> None:
        """Raises ValueError for single numbers that are out of range."""
        takes_eta = self.sampler is not None and SAMPLERS[self.sampler].takes_eta
        if not 0 <= self.eta <= 1 or (self.eta and not takes_eta):
            raise ValueError(
                f"eta belongs to sampler=ddim and lies in [0, 1]; it is {self.eta} with "
                f"sampler={self.sampler}"
            )
        guidance = self.guidance_scale
        if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
            raise ValueError(
                f"guidance_scale must be a number of at least 0 (1: no guidance), not {guidance}"
            )
        for key in ("steps", "batch_size", "every", "particles", "prompts_limit"):
            count = getattr(self, key)
            if count is not None:
                positive(key, count)
        for key in ("height", "width"):
            side = getattr(self, key)
            if side is not None and (side < 8 or side % 8):
                raise ValueError(f"{key} must be a multiple of 8 pixels, not {side}")
            if side is not None:
                at_most(key, side, LARGEST_SIDE)

    def _check_mode(self) -> None:
        """Raises ValueError for options that the mode does not go together with."""
        if self.trust_region is not None:
            positive("trust_region", self.trust_region)
        self._check_branch()
        option = unsupported_option(self.mode, self.particles, self.batched, self.trust_region)
        if option:
            modes = " or ".join(f"mode={name}" for name in modes_with(option))
            raise ValueError(f"{option} {NEEDS[option]}: give {modes}, not {self.mode}")
        if self.batched and self.compile:
            raise ValueError("batched and compile do not go together: give one of the two")

    def _check_branch(self) -> None:
        """Raises ValueError for options that a lambda for one branch does not go together with."""
        if self.branch == "both":
            return
        has_others = self.particles > 1 or self.trust_region is not None
        if not MODES[self.mode].branches or has_others or self.targets or self.bake:
            raise ValueError(
                f"branch={self.branch} is for mode=exact without particles, trust_region, targets "
                "and bake: remove these, or give branch=both"
            )

    def _check_schedule(self) -> None:
        """Raises ValueError for a schedule of another form, and for what does not go with one."""
        schedule = self.lam_schedule
        if not schedule:
            return
        is_ramp = _is_pair(schedule)
        is_stepwise = all(isinstance(point, list) and _is_pair(point) for point in schedule)
        if not is_ramp and not is_stepwise:
            raise ValueError(
                "lam_schedule is [factor at the noise, factor at the image], or a list of "
                f"[fraction of time, factor], not {schedule!r}: give lam_schedule=[1,0.2]"
            )
        if self.targets or self.bake:
            raise ValueError(
                "lam_schedule does not go together with targets and bake: remove these"
            )

    def _check_bake(self) -> None:
        """Raises ValueError where a bake would not be one lambda of mode exact."""
        if not self.bake:
            return
        is_plain = self.mode == "exact" and self.particles == 1 and self.trust_region is None
        is_one = len(self.lambdas) + len(self.targets) == 1 and self.lambdas != [0]
        if not (is_plain and is_one):
            raise ValueError(
                "bake writes the weights of one lambda, and compares them with mode=exact: give "
                "bake=<folder> lambdas=[0.5]"
            )

    def check_paths(self) -> None:
        """Refuse local paths where nothing is.

        Raises:
            ValueError: with what to type.
        """
        for anchor in self.anchors:
            check_anchor(anchor, self.runs)
        check_path("model.base", self.model.base, PIPELINE, self.runs)
        check_path("model.vae", self.model.vae, AUTOENCODER, self.runs)
        if isinstance(self.prompts, str):
            check_prompts("prompts", self.prompts)

    @property
    def mode_name(self) -> str:
        """The mode as the manifest names it."""
        return manifest_mode(self.mode, self.particles)

    @property
    def mode_detail(self) -> int | None:
        """The number that tells a run from another of its mode: `every`, or `particles`."""
        name = LABELS[self.mode_name].setting
        return getattr(self, name) if name else None

    def run_name(self) -> str:
        """The name of the run directory: a function of the config, never of the clock."""
        if self.name:
            return self.name
        detail = "" if self.mode_detail is None else self.mode_detail
        parts = [name_of_anchors(self.anchors), f"{self.mode_name}{detail}", *self._sampler_name()]
        if self.branch != "both":
            parts.append(self.branch)
        if self.lam_schedule:
            parts.append(f"schedule-{_short_digest(self.lam_schedule)}")
        if self.targets_by != PAPER:
            parts.append(self.targets_by)
        numbers = {
            "steps": self.steps,
            "guidance": self.guidance_scale,
            "trust": self.trust_region,
        }
        parts += [f"{word}{value:g}" for word, value in numbers.items() if value is not None]

        # Other prompts are another run: added to one that is compared, they would spoil it
        if self.prompts not in (None, [], SHAPES):
            parts.append(_prompts_name(self.prompts))
        if self.height or self.width:
            parts.append(f"{self.width or ''}x{self.height or ''}")
        return "-".join(parts)

    def _sampler_name(self) -> list[str]:
        """The sampler; nothing where it is not known before the anchor is read.

        It may follow from the family, which a local card or `model.name` says.
        """
        sampler = self.sampler or self._default_sampler()
        if sampler is None:
            return []
        return [sampler + (f"-eta{self.eta:g}" if self.eta else "")]

    def _default_sampler(self) -> str | None:
        card = Path(self.anchors[0]) / CARD
        family = self.model.name
        if card.is_file():
            family = str(read_json(card).get("family"))
        defaults = SAMPLING_DEFAULTS.get(family or "")
        return defaults.sampler if defaults else None


def _prompts_name(prompts: Any) -> str:
    """The name of a file or set; of a list a digest."""
    if isinstance(prompts, str):
        return slug(Path(prompts).stem)[:40]
    return "prompts-" + _short_digest(prompts)


def _short_digest(value: Any) -> str:
    """Eight digits that tell a value from others."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def _is_finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _is_pair(values: list[Any]) -> bool:
    """Whether a list holds two finite numbers."""
    return len(values) == 2 and all(map(_is_finite, values))


def _floats(lam: Any) -> Any:
    """A lambda, or a list of these, as floats; -0.0 becomes 0.0."""
    if isinstance(lam, list):
        return [_floats(one) for one in lam]
    return float(lam) + 0.0


def name_of_anchors(anchors: Sequence[str]) -> str:
    """The names of anchors: of the training run, or the last two parts of the path.

    Args:
        anchors: each by its one name.
    """
    names = []
    for anchor in anchors:
        path = Path(anchor)
        if path.name == ANCHOR:
            path = path.parent
        parts = path.parts[-2:]
        if "train" in path.parts[:-1]:
            parts = path.parts[path.parts.index("train") + 1 :]
        names.append(slug("-".join(parts)))
    return "-and-".join(names)


def _check_distinct(key: str, values: Any, example: str) -> None:
    """Raises ValueError for what is no list, is empty, or holds a value twice."""
    if not isinstance(values, list) or not values:
        raise ValueError(
            f"{key} must be a list of at least one value, not {values!r}; give {key}={example}"
        )
    for position, value in enumerate(values):
        if value in values[:position]:
            raise ValueError(f"{key} holds {value} twice; give every one once")
