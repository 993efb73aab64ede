"""What realignment costs in KL divergence, summed up while a pipeline samples.

Shapes: (images, ...), those of the latents that the scheduler denoises.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from deradiff.method.transitions import kl_factors
from deradiff.realignment.clipping import clipping_setting
from deradiff.realignment.clock import Clock


class NonlinearStepWarning(UserWarning):
    """The scheduler clips its predictions, so that mixing outputs is not the closed form.

    Given once for each `realign`.
    """


class UnknownPathKLWarning(UserWarning):
    """The path KL is nan, for a reason that the message says. Given once for each `realign`."""


class PathKL:
    """The KL divergence of a realigned chain from the reference's, for each image, in nats.

    The sum over the steps of one call of the pipeline of 1/2 L |D|^2, where
    L = ln(SNR_next / SNR) and D = eps_realigned - eps_reference, both after the pipeline's own
    guidance. With one anchor and linear guidance D = lam (eps_anchor - eps_reference). |D|^2 sums
    over channels and pixels. Where the scheduler clips its predictions, D is measured on its steps
    (`deradiff.realignment.clipping`).

    It is an estimate, not a bound: within a tenth of the true KL at lam = 1 on analytic beds. It is
    nan where a step did not evaluate the reference, and where the scheduler's signal-to-noise ratio
    is unknown.

    Args:
        clock: the step that the pipeline is at.

    Attributes:
        total: the sum so far (images,).
        unknown: why it is nan, where that is no choice of the user's; empty: it is known.
        clipping: the setting by which the scheduler clips its predictions; None: it does not.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.total = torch.zeros(0)
        self.unknown = ""
        self._factors: list[float] = []
        self._has_warned = False
        self._has_warned_nonlinear = False
        self.clipping: str | None = None

    def begin_chain(self) -> None:
        """Begin the sum of a new chain, at its first step."""
        self.total = torch.zeros(())
        self.unknown = ""
        self._factors = []
        scheduler = self.clock.scheduler
        self.clipping = clipping_setting(scheduler)
        if self.clipping:
            self._warn_nonlinear()
        try:
            self._factors = kl_factors(scheduler).tolist()
        except Exception as error:
            # Schedulers are many, and nobody may have asked for the path KL.
            self.unknown = f"{type(scheduler).__name__} does not tell its noise levels ({error})"

    def _warn_nonlinear(self) -> None:
        """Say once that the scheduler's step is not linear in the network's output."""
        if self._has_warned_nonlinear:
            return
        self._has_warned_nonlinear = True
        scheduler = type(self.clock.scheduler).__name__
        warnings.warn(
            f"{scheduler} clips its predictions ({self.clipping}=True), so that its step is not "
            "linear: the outputs are mixed before it as always, but this is not the mixture of the "
            f"steps' distributions; give a scheduler with {self.clipping}=False",
            NonlinearStepWarning,
            stacklevel=2,
        )

    @property
    def factor(self) -> float:
        """The c of this step in 1/2 L |D_eps|^2 = c |D|^2; nan where it is unknown.

        D is a difference of the network's outputs, whatever the network predicts.
        """
        index = self.clock.index
        if self.unknown or index is None or index >= len(self._factors):
            return math.nan
        return self._factors[index]

    def add(self, shift: Tensor | None, images: int) -> None:
        """Add one step.

        Args:
            shift: the guided output minus the reference's (images, ...); None: unknown.
            images: that are sampled.
        """
        if shift is None:
            share = torch.full((images,), torch.nan)
        else:
            share = self.factor * squared(shift)
        self.total = share + self.total.to(share.device)

    def forget(self, reason: str) -> None:
        """Make the sum unknown.

        Args:
            reason: why, as part of a sentence.
        """
        self.unknown = reason
        self.total = torch.full((max(self.total.numel(), 1),), torch.nan)

    def warn_unknown(self, stacklevel: int) -> None:
        """Say once why the sum is nan, where that is no choice of the user's.

        Args:
            stacklevel: of the warning: 1 is the caller's line.
        """
        if not self.unknown or self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"the path KL is nan: {self.unknown}", UnknownPathKLWarning, stacklevel=stacklevel + 1
        )


def squared(difference: Tensor) -> Tensor:
    """|D|^2 of each image: (images,) of (images, ...)."""
    return difference.float().square().flatten(1).sum(1)
