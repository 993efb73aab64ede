"""What `realign` gives back: lambda, to be turned at any time, and what the turning cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

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

LimitLams = Callable[[Sequence[Strength], Sequence[Tensor]], list[Strength]]
"""(lams, the anchors' differences from the reference) -> lams, lowered where needed."""


class BeyondAnchorWarning(UserWarning):
    """A lambda above 1 extrapolates beyond the anchor."""


class Dial:
    """How strongly a pipeline is realigned, and what that cost.

    `deradiff.realign` makes it. `dial.lam` may be set at any time, from a step callback, too:

        with deradiff.realign(pipe, anchor, lam=0.5) as dial:
            image = pipe("a red fox").images[0]
            dial.lam = 0.8

    Args:
        networks: reference and anchors.
        clock: the pipeline's position in the chain.
        kl: the path KL.
        particles: the particles of each image; None: there are none.
        trust: nats by which the chain may leave the anchor's; None: no bound.

    Attributes:
        lams: what each anchor's lambda was set to.
    """

    def __init__(
        self,
        networks: Networks,
        clock: Clock,
        kl: PathKL,
        particles: Resampling | None,
        trust: float | None,
    ) -> None:
        self._networks = networks
        self._clock = clock
        self._kl = kl
        self._particles = particles
        self._trust = trust
        self._rows_asked = 0
        self._warned = False
        self.lams: list[Lambda] = []

    @property
    def lam(self) -> Lambda | list[Lambda]:
        """Lambda; a list of them for several anchors.

        A number, a number per image, a mask over the latents, or a schedule over time (see
        `deradiff.method.lambdas`). 0 is the reference and 1 the anchor, bit for bit.
        """
        return self.lams[0] if len(self._networks.anchors) == 1 else list(self.lams)

    @lam.setter
    def lam(self, lam: Lambda | Sequence[Lambda]) -> None:
        lams = checked_lams(lam, len(self._networks.anchors))
        numbers = [value for value in lams if not callable(value)]
        self._warn_beyond_anchor(numbers, stacklevel=3)
        self.lams = lams

    @property
    def path_kl(self) -> Tensor:
        """KL of the realigned chain to the reference's, in nats: (images,).

        Of the last pipeline call, or of the one that is going on. It is an estimate (`PathKL`), and
        nan where a step did not evaluate the reference: see `path_kl` of `deradiff.realign`.
        """
        return self._kl.total

    @property
    def ess(self) -> Tensor:
        """Effective sample size of each image's particles at its smallest, 1 to K: (images,)."""
        if self._particles is None:
            return torch.ones(len(self.path_kl.flatten()))
        return self._particles.ess

    @property
    def evaluations(self) -> float:
        """Network evaluations for each one that the pipeline asked for, in the last call.

        1 is the cost of a plain model.
        """
        return self._networks.evaluated / max(self._rows_asked, 1)

    def lams_of_step(self, output_like: Tensor) -> list[Strength]:
        """The lambda of each anchor at this step.

        Args:
            output_like: a tensor of the denoiser's output's shape (rows, ...).

        Returns:
            Numbers, or tensors that broadcast to the output.
        """
        if self._clock.is_new_call:
            self._rows_asked = 0
            self._networks.evaluated = 0
        self._rows_asked += len(output_like)
        lams = [value_at(lam, self._clock.fraction) for lam in self.lams]
        self._warn_beyond_anchor(lams, stacklevel=2)
        rows_per_image = self._kl.rows_per_image
        return [broadcast_to(lam, output_like, rows_per_image) for lam in lams]

    def limit_lams(self, lams: Sequence[Strength], differences: Sequence[Tensor]) -> list[Strength]:
        """Lambdas lowered to the trust region, where there is one.

        Each step may use an equal share of its nats.

        Args:
            lams: one of each anchor.
            differences: of each anchor's output from the reference's, (rows, ...).
        """
        is_beyond = any(_largest(lam) > 1 for lam in lams)
        if self._trust is None or self._clock.index is None or not is_beyond:
            return list(lams)
        divergence = self._kl.factor * self._kl.squared(differences[0])
        columns = [1] * (differences[0].ndim - 1)
        column = divergence.repeat(self._kl.rows_per_image).view(-1, *columns)
        nats_a_step = self._trust / len(self._kl.pipe.scheduler.timesteps)
        return [trust_region(lams[0], column, nats_a_step)]

    def _warn_beyond_anchor(self, lams: Sequence[Strength], stacklevel: int) -> None:
        """Warn once where the lambdas sum to more than 1."""
        if self._warned or sum(_largest(lam) for lam in lams) <= 1:
            return
        self._warned = True
        value = lams[0] if len(lams) == 1 else lams
        warnings.warn(
            f"lam {value} lies beyond the anchor: it extrapolates, and deterministic samplers then "
            "err far more than ancestral ones (Euler ancestral, DDPM, DDIM with eta=1); "
            "trust_region bounds the overshoot",
            BeyondAnchorWarning,
            stacklevel=stacklevel + 1,
        )


def checked_lams(lam: Lambda | Sequence[Lambda], anchors: int) -> list[Lambda]:
    """One lambda or schedule for each anchor.

    Args:
        lam: one, or several in a sequence.
        anchors: how many anchors there are.

    Raises:
        ValueError: for another number of lambdas, or a value that is not a lambda.
    """
    is_several = isinstance(lam, Sequence) and not isinstance(lam, str)
    values: Sequence[Lambda] = lam if is_several else [lam]  # type: ignore[assignment, list-item]
    lams = [validated(value) for value in values]
    if len(lams) != anchors:
        raise ValueError(
            f"{anchors} anchor(s) need as many values of lam, and there are {len(lams)}; "
            "for a value per image give torch.tensor([...])"
        )
    return lams


def _largest(lam: Strength) -> float:
    return float(lam.max()) if isinstance(lam, Tensor) else lam
