"""What is checked, in which order, and how many seconds each check may take on an H100.

A section is a process of its own. The seconds are expected from what one H200 took; all of them,
with the start of the first process, are less than LIMIT. What matters most comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.gpu import dial, training
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.rows import Finding
from benchmarks.gpu.sizes import Size
from benchmarks.sample import PLAIN, Variant, timed_variants
from benchmarks.train import METHODS

LIMIT = 480.0
"""Seconds of everything."""

START = 15.0
"""Seconds until the first process has imported torch and diffusers; the others do so meanwhile."""

EXPECTED_RATE = 7e14
"""FLOP/s of large matrix products on the card that the seconds are expected on."""

LEFT_OUT = (
    "fp16: a LoRA's first beta and mode exact alone, and the bits at both ends",
    "SD1.5: without large batches and compiling",
    "large batches: the plain pipeline, and mode exact with merged weights",
    "resuming SDXL, and a full fine-tune of real size, whose checkpoint has 10 GB (SD1.5)",
)
"""What is not in the plan, so that the rest is done in time."""

EXACT_ALONE = ("sample 1: plain", "sample 1: lora exact, merged", "sample 1: full exact")
"""What is sampled where not every mode is."""

Run = Callable[[Bench], Finding]


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        name: of the row.
        seconds: that it is expected to take on an H100, all in all.
        run: does it.
    """

    name: str
    seconds: float
    run: Run


@dataclass(frozen=True)
class Section:
    """Checks that one process does in turn.

    Attributes:
        name: of the section.
        group: the network and the precision.
        checks: in their order.
    """

    name: str
    group: str
    checks: tuple[Check, ...]

    @property
    def seconds(self) -> float:
        """That all checks are expected to take."""
        return sum(check.seconds for check in self.checks)


@dataclass(frozen=True)
class Pace:
    """Seconds that a network takes on an H100.

    Attributes:
        load: to make its pipeline.
        cache: to encode the data twice.
        step: of training.
        image: of a plain pipeline, at `Size.sampler_steps`.
        lora: to put a LoRA on the network.
        compilation: of the repeated blocks, forward.
    """

    load: float
    cache: float
    step: float
    image: float
    lora: float
    compilation: float


PACES = {
    "sd15": Pace(load=1.0, cache=4.0, step=0.6, image=0.6, lora=0.7, compilation=10.0),
    "sdxl": Pace(load=2.5, cache=7.0, step=2.0, image=1.4, lora=1.5, compilation=14.0),
}


def plan(size: Size) -> list[Section]:
    """All sections, in their order."""
    return [
        Section("sdxl bf16", "sdxl bf16", _whole(size, "sdxl", [])),
        Section("sdxl bf16 compiled", "sdxl bf16", _compiled("sdxl")),
        Section(
            "sd15 bf16",
            "sd15 bf16",
            _whole(
                size,
                "sd15",
                [
                    resume("sd15", "lora"),
                    Check(
                        "offload layer by layer", 6.0, partial(dial.offload, how="layer by layer")
                    ),
                    resume("sd15", "full"),
                    Check("train lora: two processes", 22.0, training.two_processes),
                ],
            ),
        ),
        Section("sdxl fp16", "sdxl fp16", _short(size, "sdxl", [])),
        Section("sd15 fp16", "sd15 fp16", _short(size, "sd15", [resume("sd15", "lora")])),
    ]


def _whole(size: Size, network: str, more: list[Check]) -> tuple[Check, ...]:
    """Everything that is checked of a network in its main precision."""
    names = ("published", training.FIRST_BETA, training.KNOWN)
    large = _modes(network, size.images) if network == "sdxl" else []
    whole = Check("offload whole networks", 4.0, partial(dial.offload, how="whole networks"))
    return (
        *_first(network),
        *_trainings(size, network, names),
        *_modes(network, 1),
        *_ends(network),
        *large,
        whole,
        *more,
    )


def _short(size: Size, network: str, more: list[Check]) -> tuple[Check, ...]:
    """What is checked again in another precision; see LEFT_OUT."""
    exact = [check for check in _modes(network, 1) if check.name in EXACT_ALONE]
    return (
        *_first(network),
        *_trainings(size, network, (training.FIRST_BETA,), ("lora",)),
        *exact,
        *_ends(network),
        *more,
    )


def _compiled(network: str) -> tuple[Check, ...]:
    """What is compiled; in a section of its own, because compiling leaves traces in a process."""
    pace = PACES[network]
    checks = []
    for method in ("lora", "full"):
        seconds = 1.8 * pace.compilation + pace.load + 4 * pace.step
        run = partial(training.pace, method=method, name=training.COMPILED)
        checks.append(Check(f"train {method}: {training.COMPILED}", seconds, run))
    exact = {"mode": "exact", "memory": "high"}
    variants = [
        (Variant(PLAIN, "", {}), pace.load + pace.compilation),
        (Variant("lora", "exact", exact), pace.load + pace.compilation),
        (Variant("lora", "weights", {"mode": "weights"}), pace.lora),
        (Variant("full", "exact", exact), pace.lora),
    ]
    for variant, seconds in variants:
        run = partial(dial.compiled_cost, variant=variant)
        checks.append(Check(f"{dial.check_name(variant, 1)}, compiled", seconds, run))
    return tuple(checks)


def _first(network: str) -> list[Check]:
    """The card, and the cache that trainings read."""
    return [
        Check("card", 2.0, training.card),
        Check("cache", PACES[network].cache, training.cache),
    ]


def _trainings(
    size: Size, network: str, names: tuple[str, ...], methods: tuple[str, ...] = METHODS
) -> list[Check]:
    """A row for each variant of each method."""
    pace = PACES[network]
    seconds = 1.5 * pace.load + pace.step * size.works[network].steps
    checks = []
    for method in methods:
        for name in names:
            run = partial(training.pace, method=method, name=name)
            checks.append(Check(f"train {method}: {name}", seconds, run))
    return checks


def _modes(network: str, images: int) -> list[Check]:
    """A row for each mode of each kind of anchor, after the plain pipeline's."""
    pace = PACES[network]
    checks = []
    for variant in timed_variants(("lora", "full")):
        evaluations = 2 if variant.options.get("mode") == "exact" else 1.25
        if images > 1 and dial.check_name(variant, 1) not in EXACT_ALONE[:2]:
            continue
        # One image is profiled, too.
        seconds = {PLAIN: pace.load, "lora": pace.lora, "full": 0.3}[variant.anchor]
        if images == 1:
            seconds += 1.3 * pace.image * evaluations + 0.6
        else:
            seconds += 1.1 * pace.image * images * evaluations
        run = partial(dial.cost, variant=variant, images=images)
        checks.append(Check(dial.check_name(variant, images), round(seconds, 1), run))
    return checks


def _ends(network: str) -> list[Check]:
    """A row for each end of the dial and each kind of anchor."""
    pace = PACES[network]
    checks = []
    for kind in ("lora", "full"):
        for lam, end in ((0.0, "reference"), (1.0, "anchor")):
            run = partial(dial.ends, kind=kind, lam=lam)
            name = f"bits at lam {lam:g}, {kind}: the {end}"
            loads = (1 + lam) * pace.lora if kind == "lora" else 0.2
            checks.append(Check(name, loads + (2 + lam) * 0.4 * pace.image, run))
    return checks


def resume(network: str, method: str) -> Check:
    """The row of an interrupted run."""
    pace = PACES[network]
    seconds = 3 * (pace.load + pace.step + pace.lora) if method == "lora" else 4.0
    return Check(f"resume {method}", seconds, partial(training.resume, method=method))
