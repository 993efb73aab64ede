"""`python -m benchmarks.oracle [images]`: the method's figures on the analytic beds, as markdown.

It takes some minutes on two cores. docs/oracle.md explains the tables. Chains are sampled in one
dimension, and in a plane for two anchors; N is the number of images.
"""

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

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The noise schedule of Stable Diffusion."""

SAMPLERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ancestral": (EulerAncestralDiscreteScheduler, SCHEDULE),
    "DDIM": (
        DDIMScheduler,
        {
            **SCHEDULE,
            "clip_sample": False,
            "set_alpha_to_one": True,
            "timestep_spacing": "trailing",
        },
    ),
    "flow ODE": (FlowMatchEulerDiscreteScheduler, {}),
    "flow SDE": (FlowMatchSDEScheduler, {}),
    "flow stochastic": (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
}
"""The scheduler of each sampler, and its options."""

BEDS = {"lin": LIN, "quad": QUAD, "bounded": BOUNDED}
CASES = (
    ("lin", 0.5),
    ("lin", 2.0),
    ("quad", 0.5),
    ("bounded", 0.5),
    ("bounded", 2.0),
    ("bounded", 3.0),
)
"""The beds and lambdas of the tables."""

QUANTILES = 4000
"""Chains of a deterministic sampler."""


def scheduler_of(kind: str, steps: int) -> Any:
    """A scheduler, its timesteps set.

    Args:
        kind: a key of SAMPLERS.
        steps: of the chain.
    """
    scheduler_class, options = SAMPLERS[kind]
    scheduler = scheduler_class(**options)
    scheduler.set_timesteps(steps)
    return scheduler


class Runs:
    """The realigned chain and the exact model's, from the same noise.

    Args:
        bed: whose densities and networks are known.
        lam: lambda.
        kind: of the sampler, a key of SAMPLERS.
        steps: of the sampler.
        images: N.

    Attributes:
        target: the log density of the exact tilt, on the grid of the beds.
        quantiles: of the exact tilt (N,).
    """

    def __init__(self, bed: Bed, lam: float, kind: str, steps: int, images: int) -> None:
        self.scheduler = scheduler_of(kind, steps)
        self.lam = lam
        self.images = images
        strength = lam * bed.strength
        strengths = [0, bed.strength, strength]
        self.reference, self.anchor, self.exact = bed.models(self.scheduler, strengths)
        self.target = bed.log_density(strength)
        self.quantiles = bed.quantiles(strength, images)

    def mixed(self, particles: int = 1, trust_region: float | None = None) -> Tensor:
        """The realigned chain's samples (N,)."""
        start = noise(self.scheduler, self.images * particles)
        return self._chain(self.anchor, self.lam, start, particles, trust_region)

    def floor(self) -> Tensor:
        """The exact model's samples (N,), which err by the sampler's own error alone."""
        return self._chain(self.exact, 1.0, noise(self.scheduler, self.images))

    def without_chance(self) -> tuple[Tensor, Tensor]:
        """Both chains of a deterministic sampler, from evenly spaced quantiles of the noise."""
        start = even_noise(self.scheduler, QUANTILES)
        return self._chain(self.anchor, self.lam, start), self._chain(self.exact, 1.0, start)

    def figures(self, x: Tensor) -> str:
        """The KL of samples (N,) to the exact tilt, and in parentheses their W2 distance."""
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
        x = realigned_chain(
            self.reference,
            anchor,
            self.scheduler,
            start,
            lam,
            eta,
            torch.Generator().manual_seed(1),
            particles=particles,
            trust_region=trust_region,
        )
        return x[:, 0]


def print_row(*cells: object) -> None:
    """A line of a markdown table."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def print_head(title: str, *cells: str) -> None:
    """A title and the head of a table."""
    print(f"\n{title}\n")
    print_row(*cells)
    print_row(*["---"] * len(cells))


def print_mixing_error(images: int) -> None:
    """What mixing costs, by bed, lambda, sampler and number of steps."""
    samplers = [("ancestral", 50), ("ancestral", 200), ("DDIM", 50), ("DDIM", 200)]
    columns = [f"{kind}, {steps}" for kind, steps in samplers]
    print_head("KL to the exact tilt, mixture / floor", "bed", "lambda", *columns)
    for bed, lam in CASES:
        cells = []
        for kind, steps in samplers:
            runs = Runs(BEDS[bed], lam, kind, steps, images)
            # A deterministic sampler transports quantiles, with no chance in the result.
            if kind == "ancestral":
                divergences = [kl_of_samples(x, runs.target) for x in (runs.mixed(), runs.floor())]
            else:
                divergences = [kl_of_quantiles(x, runs.target) for x in runs.without_chance()]
            cells.append("/".join(f"{divergence:.3f}" for divergence in divergences))
        print_row(bed, lam, *cells)


def print_particles(images: int) -> None:
    """What particles correct, by bed, lambda and sampler."""
    title = "KL (W2) to the exact tilt by number of particles, 50 steps"
    print_head(title, "bed", "lambda", "sampler", "none", "4", "16", "floor")
    cases = [(bed, lam, "ancestral") for bed, lam in CASES]
    cases += [("lin", 0.5, kind) for kind in ("flow ODE", "flow SDE", "flow stochastic")]
    for bed, lam, kind in cases:
        runs = Runs(BEDS[bed], lam, kind, 50, images)
        samples = [runs.mixed(), runs.mixed(4), runs.mixed(16), runs.floor()]
        print_row(bed, lam, kind, *[runs.figures(x) for x in samples])


def print_trust_region(images: int) -> None:
    """What a trust region does beyond the anchor."""
    budgets = (None, 0.1, 0.3, 1.0, 3.0)
    columns = ["none" if nats is None else str(nats) for nats in budgets]
    title = "KL (W2), bounded bed, lambda 3, 50 steps, by trust region in nats"
    print_head(title, "sampler", *columns)
    for kind in ("ancestral", "DDIM"):
        runs = Runs(BOUNDED, 3.0, kind, 50, images)
        samples = [runs.mixed(trust_region=nats) for nats in budgets]
        print_row(kind, *[runs.figures(x) for x in samples])


def print_beta_law() -> None:
    """How the mixing error falls with beta."""
    title = "KL to the exact model's chain, lambda .5, 50 steps, by beta, and its ratio"
    print_head(title, "bed", "sampler", "beta", "2 beta", "4 beta", "ratios")
    for name, bed in BEDS.items():
        for kind in ("DDIM", "flow ODE"):
            divergences = []
            for factor in (1, 2, 4):
                weaker = Bed(bed.reward, bed.strength / factor)
                divergences.append(kl_between(*Runs(weaker, 0.5, kind, 50, 10).without_chance()))
            ratios = ", ".join(f"{a / b:.1f}" for a, b in pairwise(divergences))
            print_row(name, kind, *[f"{divergence:.1e}" for divergence in divergences], ratios)


def print_two_anchors(images: int) -> None:
    """Two anchors at once, in the plane: mixed, with particles, and the exact model."""
    print_head(
        "Two anchors in the plane, weights (.5, .5): total variation of the modes, "
        "ancestral, 50 steps",
        "mixture",
        "K = 4",
        "floor",
    )
    plane = Plane()
    lams = [0.5, 0.5]
    scheduler = scheduler_of("ancestral", 50)
    reference = plane.prior.model(scheduler)
    target = plane.target(lams).model(scheduler)
    anchors = [mixture.model(scheduler) for mixture in plane.anchors]

    # How far the shares of the modes are from the exact ones.
    cells = []
    mixtures = [(anchors, lams, 1), (anchors, lams, 4)]
    for models, weights, particles in [*mixtures, ([target], [1.0], 1)]:
        x = realigned_chain(
            reference,
            models,
            scheduler,
            noise(scheduler, images * particles, 2),
            weights,
            1.0,
            torch.Generator().manual_seed(1),
            particles=particles,
        )
        difference = plane.mode_shares(x) - plane.exact_mode_shares(lams)
        cells.append(f"{0.5 * difference.abs().sum().item():.3f}")
    print_row(*cells)


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 40_000
    print_particles(count)
    print_trust_region(count)
    print_beta_law()
    print_two_anchors(count)
    print_mixing_error(count)
