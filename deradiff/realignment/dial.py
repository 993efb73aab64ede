"""What `realign` gives to the user: lambda, to be set at any time, and what sampling cost."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from deradiff.method.branches import BranchStrengths, ByBranch
from deradiff.method.lambdas import Lambda, Strength, validated, value_at
from deradiff.realignment.clock import Clock
from deradiff.realignment.networks import Cost
from deradiff.realignment.path_kl import PathKL
from deradiff.realignment.resampling import Resampling

BEYOND_ANCHOR = (
    "lies beyond the anchor: it extrapolates, and deterministic samplers then err far more than "
    "ancestral ones"
)
"""What there is to say of a lambda above 1, after its value."""


CLOSED = "this dial turns nothing any more, since its pipeline was given back: call realign again"
"""What there is to say of a dial whose block has ended."""

NEGATIVE = (
    "a negative lam goes from the reference away from the anchor: it extrapolates, and imitates no "
    "model that was aligned with this reward"
)
"""What there is to say of a lambda below 0."""


LONGEST_SHOWN = 8
"""Lambdas of images that a dial shows as numbers."""


class BeyondAnchorWarning(UserWarning):
    """A lambda above 1 extrapolates. It is given once for each `realign`."""


class NegativeLambdaWarning(UserWarning):
    """A lambda below 0 goes away from the anchor. It is given once for each `realign`."""


SETTABLE = ("lam", "lams", "strengths")
"""The attributes of a dial that are set from outside or inside, beside private ones."""


class Dial:
    """How strongly a pipeline is realigned, and what that cost.

    `realign` makes it; users set `lam` and read the other attributes. The pipeline is realigned
    until the dial's `with` block ends, or until `close`.

    Args:
        anchors: the number of anchors.
        cost: what was evaluated.
        clock: the step that the pipeline is at.
        kl: the path KL of the chain.
        resampling: the particles; None: there are none.
        takes_branches: whether the mode takes a lambda for each branch of guidance.

    Attributes:
        lams: lambda of each anchor.
        strengths: what these are at the present step.
    """

    def __init__(
        self,
        anchors: int,
        cost: Cost,
        clock: Clock,
        kl: PathKL,
        resampling: Resampling | None,
        takes_branches: bool,
    ) -> None:
        self._anchors = anchors
        self._cost = cost
        self._clock = clock
        self._kl = kl
        self._resampling = resampling
        self._takes_branches = takes_branches
        self._has_warned = False
        self._has_warned_negative = False
        # Gives the pipeline back; None: it has been given back.
        self._undo: ExitStack | None = ExitStack()
        self.lams: list[Lambda] = []
        self.strengths: list[Strength] = []

    def __enter__(self) -> Dial:
        """Begin the block in which the pipeline is realigned."""
        if self._undo is None:
            raise ValueError(CLOSED)
        return self

    def __exit__(self, *error: Any) -> None:
        """Give the pipeline back as it was."""
        self.close()

    def close(self) -> None:
        """Give the pipeline back as it was, bit for bit. A second time does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    def hold(self, undo: ExitStack) -> None:
        """Take over what gives the pipeline back.

        Args:
            undo: closed by `close`.
        """
        self._undo = undo

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute that a dial has: a slip of the keyboard must not go by unseen."""
        if not name.startswith("_") and name not in SETTABLE:
            raise AttributeError(f"a dial has no {name} to be set: set dial.lam")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        """Lambda, and what the last call cost."""
        shown = ", ".join(_shown(lam) for lam in self.lams)
        parts = [f"lam={shown}" if self._anchors == 1 else f"lam=[{shown}]"]
        if self._cost.rows_requested:
            path_kl = ", ".join(f"{value:.3g}" for value in self._kl.total.flatten().tolist())
            parts += [f"path_kl=[{path_kl}]", f"evaluations={self.evaluations:.3g}"]
        if self._undo is None:
            parts.append("closed")
        return f"Dial({', '.join(parts)})"

    @property
    def lam(self) -> Lambda | list[Lambda]:
        """Lambda: 0 is the reference and 1 the anchor, bit for bit.

        It is a number, a number for each image (images,), a mask over the latents, or a schedule
        over time (`deradiff.method.lambdas`); with several anchors, a list of these. It may be set
        at any time, also from a step callback of the pipeline.

        Raises:
            ValueError: for a value that is none of these, or another number of them than anchors;
                and where the pipeline is no longer realigned.
        """
        return self.lams[0] if self._anchors == 1 else list(self.lams)

    @lam.setter
    def lam(self, lam: Lambda | ByBranch | Sequence[Lambda | ByBranch]) -> None:
        if self._undo is None:
            raise ValueError(CLOSED)
        lams = validated_lams(lam, self._anchors)
        if any(isinstance(value, ByBranch) for value in lams) and not self._takes_branches:
            raise ValueError("a lam for each branch of guidance needs mode='exact'")
        known = [value for value in lams if isinstance(value, float | Tensor)]
        self._warn_beyond(known, stacklevel=3)
        self.lams = lams

    @property
    def has_schedule(self) -> bool:
        """Whether lambda changes over time."""
        return any(_is_schedule(lam) for lam in self.lams)

    @property
    def path_kl(self) -> Tensor:
        """KL divergence of the realigned chain from the reference's, in nats (images,).

        Of the last chain of steps, or of the one that is running. A call of a pipeline is one
        chain, except where it samples in stages. It is an estimate (see
        `deradiff.realignment.path_kl.PathKL`), and nan where some step did not evaluate the
        reference (see `path_kl` of `realign`) or where it cannot be known, which is then said once.

        Warns:
            UnknownPathKLWarning: where it is nan for a reason that is no choice of the user's.
        """
        self._kl.warn_unknown(stacklevel=2)
        return self._kl.total

    @property
    def ess(self) -> Tensor:
        """Effective sample size of each image's particles, 1 to K, at its smallest (images,).

        Of the last call of the pipeline, or of the one that is running; 1 without particles.
        """
        if self._resampling:
            return self._resampling.ess
        return torch.ones(len(self._kl.total.flatten()))

    @property
    def evaluations(self) -> float:
        """Network evaluations for each one that the pipeline asked for; 1 is a plain model's cost.

        Of the last call of the pipeline, or of the one that is running. A first step that
        `shared_start` remembers counts as every other.
        """
        return self._cost.rows_evaluated / max(self._cost.rows_requested, 1)

    def begin_evaluation(self, rows: int) -> list[Strength]:
        """Begin an evaluation of the denoiser.

        Args:
            rows: of its batch.

        Returns:
            The strength of each anchor at this step.
        """
        if self._clock.is_new_call:
            self._cost.rows_requested = 0
            self._cost.rows_evaluated = 0
        self._cost.rows_requested += rows
        self.strengths = [_strength_at(lam, self._clock.fraction) for lam in self.lams]
        self._warn_beyond(self.strengths, stacklevel=2)
        return self.strengths

    def _warn_beyond(self, lams: Sequence[Strength], stacklevel: int) -> None:
        """Say once that lambda is above 1, and once that one is below 0."""
        if not self._has_warned_negative and any(_smallest(lam) < 0 for lam in lams):
            self._has_warned_negative = True
            warnings.warn(NEGATIVE, NegativeLambdaWarning, stacklevel=stacklevel + 1)
        if self._has_warned or sum(_largest(lam) for lam in lams) <= 1:
            return
        self._has_warned = True
        value = lams[0] if len(lams) == 1 else lams
        warnings.warn(
            f"lam {value} {BEYOND_ANCHOR} (Euler ancestral, DDPM, DDIM with eta=1); trust_region "
            "bounds the overshoot",
            BeyondAnchorWarning,
            stacklevel=stacklevel + 1,
        )


def validated_lams(lam: Lambda | ByBranch | Sequence[Lambda | ByBranch], anchors: int) -> list[Any]:
    """The lam of each anchor.

    Args:
        lam: one for each anchor; without a list for one anchor.
        anchors: the number of anchors.

    Raises:
        ValueError: for another number of values, or for a value that is not a lam.
    """
    is_list = isinstance(lam, Sequence) and not isinstance(lam, str)
    values: Sequence[Lambda] = lam if is_list else [lam]  # type: ignore[assignment, list-item]
    lams: list[Any] = []
    for value in values:
        lams.append(value.validated() if isinstance(value, ByBranch) else validated(value))
    if len(lams) != anchors:
        raise ValueError(
            f"{anchors} anchor(s) need as many values of lam, and there are {len(lams)}; for a "
            "value per image give torch.tensor([...])"
        )
    return lams


def _shown(lam: Any) -> str:
    """A lambda in a few characters."""
    if isinstance(lam, Tensor):
        values = lam.flatten().tolist()
        is_short = lam.ndim == 1 and len(values) <= LONGEST_SHOWN
        if is_short:
            return f"[{', '.join(f'{value:g}' for value in values)}]"
        return f"mask of {'x'.join(map(str, lam.shape))}"
    if isinstance(lam, ByBranch):
        return f"ByBranch({_shown(lam.conditional)}, {_shown(lam.unconditional)})"
    return "schedule" if callable(lam) else f"{lam:g}"


def _strength_at(lam: Any, fraction: float) -> Any:
    """The strength that a lambda means at a fraction of time, or those of both branches."""
    if isinstance(lam, ByBranch):
        return lam.value_at(fraction)
    return value_at(lam, fraction)


def _is_schedule(lam: Any) -> bool:
    """Whether a lambda, or that of one branch of guidance, changes over time."""
    if isinstance(lam, ByBranch):
        return _is_schedule(lam.conditional) or _is_schedule(lam.unconditional)
    return callable(lam) and not isinstance(lam, Tensor)


def _largest(lam: Any) -> float:
    if isinstance(lam, BranchStrengths):
        return max(_largest(lam.conditional), _largest(lam.unconditional))
    return float(lam.max()) if isinstance(lam, Tensor) else lam


def _smallest(lam: Any) -> float:
    if isinstance(lam, BranchStrengths):
        return min(_smallest(lam.conditional), _smallest(lam.unconditional))
    return float(lam.min()) if isinstance(lam, Tensor) else lam
