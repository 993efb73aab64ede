"""The method's figures on the analytic beds, as markdown: `python -m benchmarks.oracle [images]`
(minutes on two cores)."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from deradiff.method.chain import realigned_chain
from deradiff.method.schedulers import FlowMatchSDEScheduler
from deradiff.worlds.beds import (
    BOUNDED,
    LIN,
    QUAD,
    Bed,
    Plane,
    even_noise,
    kl_between,
    kl_of_quantiles,
    kl_of_samples,
    noise,
    w2,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BEDS = {"lin": LIN, "quad": QUAD, "bounded": BOUNDED}
CASES = (
    ("lin", 0.5),
    ("lin", 2.0),
    ("quad", 0.5),
    ("bounded", 0.5),
    ("bounded", 2.0),
    ("bounded", 3.0),
)


def scheduler_of(kind: str, steps: int) -> Any:
    scheduler = {
        "ancestral": lambda: EulerAncestralDiscreteScheduler(**SD),
        "DDIM": lambda: DDIMScheduler(
            **SD, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
        ),
        "flow ODE": lambda: FlowMatchEulerDiscreteScheduler(),
        "flow SDE": FlowMatchSDEScheduler,
        "flow stochastic": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    }[kind]()
    scheduler.set_timesteps(steps)
    return scheduler


class Runs:
    """The realigned chain and the exact model's on one bed, lambda and sampler, from the same
    noise."""

    def __init__(self, bed: Bed, lam: float, kind: str, steps: int, images: int) -> None:
        self.scheduler, self.lam, self.images = scheduler_of(kind, steps), lam, images
        self.reference, self.anchor, self.exact = bed.models(
            self.scheduler, [0, bed.strength, lam * bed.strength]
        )
        self.target, self.quantiles = (
            bed.log_density(lam * bed.strength),
            bed.quantiles(lam * bed.strength, images),
        )

    def mixed(self, particles: int = 1, trust_region: float | None = None) -> Tensor:
        return self._chain(
            self.anchor,
            self.lam,
            noise(self.scheduler, self.images * particles),
            particles,
            trust_region,
        )

    def floor(self) -> Tensor:
        return self._chain(self.exact, 1.0, noise(self.scheduler, self.images))

    def without_chance(self) -> tuple[Tensor, Tensor]:
        """Both chains of a deterministic sampler, from evenly spaced quantiles of the noise."""
        start = even_noise(self.scheduler, 4000)
        return self._chain(self.anchor, self.lam, start), self._chain(self.exact, 1.0, start)

    def figures(self, x: Tensor) -> str:
        return f"{kl_of_samples(x, self.target):.3f} ({w2(x, self.quantiles):.3f})"

    def _chain(
        self,
        anchor: Any,
        lam: float,
        start: Tensor,
        particles: int = 1,
        trust_region: float | None = None,
    ) -> Tensor:
        eta = 0.0 if isinstance(self.scheduler, DDIMScheduler) else 1.0
        options: dict[str, Any] = {"particles": particles, "trust_region": trust_region}
        return realigned_chain(
            self.reference,
            anchor,
            self.scheduler,
            start,
            lam,
            eta,
            torch.Generator().manual_seed(1),
            **options,
        )[:, 0]


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def head(title: str, *cells: str) -> None:
    print(f"\n{title}\n")
    row(*cells)
    row(*("---" for _ in cells))


def mixing_error(images: int) -> None:
    samplers = [("ancestral", 50), ("ancestral", 200), ("DDIM", 50), ("DDIM", 200)]
    head(
        "KL to the exact tilt, mixture / floor",
        "bed",
        "lambda",
        *(f"{kind}, {steps}" for kind, steps in samplers),
    )
    for bed, lam in CASES:
        cells = []
        for kind, steps in samplers:
            runs = Runs(BEDS[bed], lam, kind, steps, images)
            kl = kl_of_samples if kind == "ancestral" else kl_of_quantiles
            ends = (runs.mixed(), runs.floor()) if kind == "ancestral" else runs.without_chance()
            cells.append("/".join(f"{kl(x, runs.target):.3f}" for x in ends))
        row(bed, lam, *cells)


def corrector(images: int) -> None:
    head(
        "KL (W2) to the exact tilt by number of particles, 50 steps",
        "bed",
        "lambda",
        "sampler",
        "none",
        "4",
        "16",
        "floor",
    )
    cases = [(*case, "ancestral") for case in CASES] + [
        ("lin", 0.5, kind) for kind in ("flow ODE", "flow SDE", "flow stochastic")
    ]
    for bed, lam, kind in cases:
        runs = Runs(BEDS[bed], lam, kind, 50, images)
        row(
            bed,
            lam,
            kind,
            *(runs.figures(x) for x in (runs.mixed(), runs.mixed(4), runs.mixed(16), runs.floor())),
        )


def trust(images: int) -> None:
    budgets = (0.1, 0.3, 1.0, 3.0)
    head(
        "KL (W2), bounded bed, lambda 3, 50 steps, by trust region in nats",
        "sampler",
        "none",
        *(str(nats) for nats in budgets),
    )
    for kind in ("ancestral", "DDIM"):
        runs = Runs(BOUNDED, 3.0, kind, 50, images)
        row(kind, *(runs.figures(runs.mixed(trust_region=nats)) for nats in (None, *budgets)))


def beta_law() -> None:
    head(
        "KL to the exact model's chain, lambda .5, 50 steps, by beta, and its ratio",
        "bed",
        "sampler",
        "beta",
        "2 beta",
        "4 beta",
        "ratios",
    )
    for bed in BEDS.values():
        for kind in ("DDIM", "flow ODE"):
            beds = [Bed(bed.reward, bed.strength / scale) for scale in (1, 2, 4)]
            kls = [kl_between(*Runs(b, 0.5, kind, 50, 10).without_chance()) for b in beds]
            name = next(name for name, b in BEDS.items() if b is bed)
            row(
                name,
                kind,
                *(f"{kl:.1e}" for kl in kls),
                ", ".join(f"{a / b:.1f}" for a, b in pairwise(kls)),
            )


def modes(images: int) -> None:
    head(
        "Two anchors in the plane, weights (.5, .5): total variation of the modes, ancestral, 50 "
        "steps",
        "mixture",
        "K = 4",
        "floor",
    )
    bed, lams, scheduler = Plane(), [0.5, 0.5], scheduler_of("ancestral", 50)
    reference, target, *anchors = (
        m.model(scheduler) for m in (bed.prior, bed.target(lams), *bed.anchors)
    )
    cells = []
    for models, weights, particles in (
        (anchors, lams, 1),
        (anchors, lams, 4),
        ([target], [1.0], 1),
    ):
        start, generator = noise(scheduler, images * particles, 2), torch.Generator().manual_seed(1)
        x = realigned_chain(
            reference, models, scheduler, start, weights, 1.0, generator, particles=particles
        )
        cells.append(
            f"{0.5 * (bed.mode_shares(x) - bed.exact_mode_shares(lams)).abs().sum().item():.3f}"
        )
    row(*cells)


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 40_000
    corrector(count)
    trust(count)
    beta_law()
    modes(count)
    mixing_error(count)
