"""What `realign` hands back: lambda, to be turned at any time, and what the turning cost."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from deradiff.method.lambdas import (
    Lambda,
    Strength,
    broadcast_to,
    trust_region,
    validated,
    value_at,
)
from deradiff.realignment.clock import Clock
from deradiff.realignment.networks import Networks
from deradiff.realignment.path_kl import PathKL
from deradiff.realignment.resampling import Resampling


class Dial:
    """How strongly a pipeline is realigned, and what that cost.

    lam: a number, a number per image, a mask or a schedule (`deradiff.method.lambdas`); for several anchors a list of these. It may be set at any
    time, from a step callback too. 0 is the reference and 1 the anchor, bit for bit.
    """

    def __init__(
        self,
        networks: Networks,
        clock: Clock,
        kl: PathKL,
        particles: Resampling | None,
        trust: float | None,
    ) -> None:
        self._networks, self._clock, self._kl, self._particles, self._trust = (
            networks,
            clock,
            kl,
            particles,
            trust,
        )
        self._asked, self._warned = 0, False
        self.lams: list[Lambda] = []

    @property
    def lam(self) -> Lambda | list[Lambda]:
        return self.lams[0] if len(self._networks.anchors) == 1 else list(self.lams)

    @lam.setter
    def lam(self, lam: Lambda | Sequence[Lambda]) -> None:
        lams = checked_lams(lam, len(self._networks.anchors))
        self._warn_beyond([value for value in lams if not callable(value)], stacklevel=3)
        self.lams = lams

    @property
    def path_kl(self) -> Tensor:
        """KL of the realigned chain to the reference's, in nats: (images,), of the last pipeline call, or of the one that goes on.

        An estimate (PathKL). nan where a step did not evaluate the reference: see `path_kl` of `realign`.
        """
        return self._kl.total

    @property
    def ess(self) -> Tensor:
        """Effective sample size of each image's particles, 1 to K, at its smallest on the way: (images,), of the last pipeline call."""
        return self._particles.ess if self._particles else torch.ones(len(self.path_kl.flatten()))

    @property
    def evaluations(self) -> float:
        """Network evaluations for each one that the pipeline asked for, in the last call: 1 is the cost of one plain model."""
        return self._networks.evaluated / max(self._asked, 1)

    def turn(self, output_like: Tensor) -> list[Strength]:
        """The weight of each anchor at this step, in shapes that broadcast to the denoiser's output (rows, ...)."""
        if self._clock.began:
            self._asked = self._networks.evaluated = 0
        self._asked += len(output_like)
        strengths = [value_at(lam, self._clock.fraction) for lam in self.lams]
        self._warn_beyond(strengths, stacklevel=2)
        return [broadcast_to(lam, output_like, self._kl.copies) for lam in strengths]

    def bounded(self, lams: Sequence[Strength], differences: Sequence[Tensor]) -> list[Strength]:
        """lams, shortened to the trust region where there is one: each step an equal share of its nats."""
        if (
            self._trust is None
            or self._clock.index is None
            or not any(_largest(lam) > 1 for lam in lams)
        ):
            return list(lams)
        divergence = self._kl.factor * self._kl.squared(differences[0])
        column = divergence.repeat(self._kl.copies).view(-1, *[1] * (differences[0].ndim - 1))
        return [trust_region(lams[0], column, self._trust / len(self._kl.pipe.scheduler.timesteps))]

    def _warn_beyond(self, lams: Sequence[Strength], stacklevel: int) -> None:
        if not self._warned and sum(_largest(lam) for lam in lams) > 1:
            self._warned = True
            warnings.warn(
                f"lam {lams[0] if len(lams) == 1 else lams} lies beyond the anchor: it extrapolates, and deterministic samplers then err "
                "far more than ancestral ones (Euler ancestral, DDPM, DDIM with eta=1); trust_region bounds the overshoot",
                stacklevel=stacklevel + 1,
            )


def checked_lams(lam: Lambda | Sequence[Lambda], anchors: int) -> list[Lambda]:
    """One strength or schedule an anchor. Raises ValueError for another number of them, or for what is none."""
    values: Sequence[Lambda] = (
        lam if isinstance(lam, Sequence) and not isinstance(lam, str) else [lam]
    )
    lams = [validated(value) for value in values]
    if len(lams) != anchors:
        raise ValueError(
            f"{anchors} anchor(s) need as many values of lam, and there are {len(lams)}; for a value per image give torch.tensor([...])"
        )
    return lams


def _largest(lam: Strength) -> float:
    return float(lam.max()) if isinstance(lam, Tensor) else lam
