"""What an anchor is, from some pairs that it was not trained on: `deradiff.calibrate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from deradiff.anchors.anchor import BETA_CONVENTION, Anchor, check_anchor
from deradiff.anchors.beta_maps import POINT
from deradiff.calibration.estimates import (
    BETAS,
    LN_2,
    best_lam,
    best_lam_value,
    effective_beta,
    is_found,
    loss_at_best_lam,
    mean_estimate,
    pair_accuracies,
    pair_losses,
    trajectory_beta,
    winner_errors,
)
from deradiff.calibration.measure import default_resolution, measure
from deradiff.calibration.moments import Moments
from deradiff.data.pairs import Pairs
from deradiff.evaluation.statistics import Estimate
from deradiff.evaluation.tables.table import flatten, interval
from deradiff.realignment.context import Source, sources_of

TABLE_BETAS = (500.0, 1000.0, 2000.0, 5000.0, 10000.0)
"""Betas of the table, besides those that the anchors were trained at."""

TABLE_LAMS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Lambdas of the table."""


MAP_STEPS = 8
"""Half octaves from the middle of the map of a card to its ends."""


@dataclass(frozen=True)
class CalibratedAnchor:
    """What held-out pairs say of one anchor.

    Betas are in the convention `mean-half`; intervals are 95 %, by bootstrap over pairs.

    Attributes:
        name: as the anchor was named.
        beta: that it was trained at; None where no card says it in that convention.
        beta_eff: the beta at which it has the lowest held-out loss as it is.
        trajectory_beta: the temperature of its whole trajectory. It depends on the draws: compare
            anchors of one calibration alone.
        accuracy: the implicit accuracy at lam = 1.
        best_lam: lam*, of the lowest held-out loss at `beta`; None without a beta.
        loss: the held-out loss at lam = 1 and `beta`; the reference has ln 2.
        best_loss: that at lam*, by other pairs than chose it.
        moments: of the pairs.
    """

    name: str
    beta: float | None
    beta_eff: Estimate
    trajectory_beta: Estimate
    accuracy: Estimate
    best_lam: Estimate | None
    loss: Estimate | None
    best_loss: Estimate | None
    moments: Moments

    def best_lam_at(self, beta: float) -> Estimate:
        """lam*(beta): the lambda of the lowest held-out loss at a beta.

        It is the optimum of the loss of Diffusion-DPO, not of the KL objective.

        Args:
            beta: in the convention `mean-half`.
        """
        return best_lam(self.moments, beta)

    @property
    def numbers(self) -> dict[str, float]:
        """What a card holds: the estimates with the ends of their intervals, and the pairs."""
        estimates = {
            "beta_eff": self.beta_eff,
            "accuracy": self.accuracy,
            "best_lam": self.best_lam,
            "loss": self.loss,
            "best_loss": self.best_loss,
        }
        known = {name: value for name, value in estimates.items() if value is not None}
        points = {f"{POINT}{beta:g}": best_lam_value(self.moments, beta) for beta in self._grid}
        return {"pairs": float(self.moments.pairs), **flatten(known), **points}

    @property
    def _grid(self) -> list[float]:
        """Betas around its own, of the map that a card holds."""
        middle = self.beta or self.beta_eff.value
        return [middle * 2 ** (step / 2) for step in range(-MAP_STEPS, MAP_STEPS + 1)]

    @property
    def verdict(self) -> str:
        """What the anchor is, in a sentence."""
        acts = f"acts like beta {interval(self.beta_eff)}"
        if not is_found(self.beta_eff):
            side = "below" if self.beta_eff.value <= BETAS[0] else "above"
            acts = f"acts like no beta that was looked for: it lies {side} them"
        if self.beta is None or self.loss is None or self.best_lam is None:
            return f"{self.name}, of unknown beta, {acts}."
        loss = f"its held-out loss is {interval(self.loss)}"
        if self.loss.low > LN_2:
            loss += ", worse than the reference's 0.693"
        elif self.loss.high < LN_2:
            loss += ", better than the reference's 0.693"
        else:
            loss += ", which cannot be told from the reference's 0.693"
        assert self.best_loss is not None  # there is one where there is a beta
        return (
            f"{self.name}, trained at beta {self.beta:g}, {acts}; at beta {self.beta:g} {loss}, "
            f"and lam = {interval(self.best_lam)} is best, with {interval(self.best_loss)}."
        )


@dataclass(frozen=True)
class Calibration:
    """What held-out pairs say of anchors.

    Attributes:
        anchors: a result for each.
        moments: of all anchors, from which any other lambda and beta follow.
    """

    anchors: list[CalibratedAnchor]
    moments: Moments

    @property
    def verdicts(self) -> list[str]:
        """A sentence for each anchor."""
        return [anchor.verdict for anchor in self.anchors]

    def table(
        self, lams: Sequence[float] = TABLE_LAMS, betas: Sequence[float] = TABLE_BETAS
    ) -> pd.DataFrame:
        """Held-out loss, implicit accuracy and the winner's error over lambda and beta.

        Args:
            lams: lambdas of the rows.
            betas: betas of the rows; an anchor's own is among them.

        Returns:
            A row for each anchor, beta and lambda: `anchor`, `beta`, `lam`, `loss`, `accuracy` and
            `winner_error` (less the reference's), each with `_low` and `_high`.
        """
        return pd.DataFrame([flatten(row) for row in self.rows(lams, betas)])

    def rows(self, lams: Sequence[float], betas: Sequence[float]) -> list[dict[str, Any]]:
        """The rows of `table`, with estimates that hold their intervals.

        Args:
            lams: lambdas of the rows.
            betas: betas of the rows; an anchor's own is among them.
        """
        rows = []
        for anchor in self.anchors:
            own = [] if anchor.beta is None else [anchor.beta]
            for beta in sorted({*betas, *own}):
                for lam in lams:
                    rows.append(_row(anchor, beta, lam))
        return rows


def _row(anchor: CalibratedAnchor, beta: float, lam: float) -> dict[str, Any]:
    """One row of the table."""
    moments = anchor.moments
    return {
        "anchor": anchor.name,
        "beta": beta,
        "lam": lam,
        "loss": mean_estimate(pair_losses(moments, [lam], beta)),
        "accuracy": mean_estimate(pair_accuracies(moments, [lam])),
        "winner_error": mean_estimate(winner_errors(moments, [lam])),
    }


def calibrate(
    pipe: Any,
    anchor: Source | Sequence[Source],
    pairs: Pairs | str | Path,
    *,
    count: int = 512,
    draws: int = 6,
    batch_size: int = 8,
    resolution: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Tell how strongly anchors are aligned, by preference pairs that they were not trained on.

    One pass of the reference and the anchors over noisy images of the pairs gives the held-out loss
    of Diffusion-DPO at every lambda and beta (docs/calibration.md). No image is sampled.
    It costs `2 count draws` evaluations of each network.

    Intervals shrink with the root of the number of pairs.

    Args:
        pipe: a text-to-image pipeline of a known family, the reference.
        anchor: what `deradiff.realign` takes, or a list of these.
        pairs: `Pairs`, or a path or hub id of a table of them.
        count: of pairs, at most; they are a random choice where there are more.
        draws: of a timestep and noise for each pair.
        batch_size: pairs whose images are evaluated at once.
        resolution: pixels of an image's side; None: the pipeline's own.
        seed: of the random choices.
        progress: show a progress bar.

    Raises:
        ValueError: for fewer than two pairs, an anchor that does not fit, and an anchor whose
            outputs are the reference's.
    """
    # Mistakes first, before a weight is read.
    least = {"count": (count, 2), "draws": (draws, 1), "batch_size": (batch_size, 1)}
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, not {value}")
    anchors = [check_anchor(source, pipe) for source in sources_of(anchor)]
    data = pairs if isinstance(pairs, Pairs) else Pairs(str(pairs))
    if len(data) < 2:
        raise ValueError(f"{data.path} has one pair, and an interval needs at least two: give more")

    # One pass, and what follows from it.
    moments = measure(
        pipe,
        anchors,
        data,
        resolution=resolution or default_resolution(pipe),
        count=count,
        draws=draws,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    results = []
    for number_of_anchor, one in enumerate(anchors):
        results.append(_calibrated(one, moments.of(number_of_anchor)))
    return Calibration(results, moments)


def _calibrated(anchor: Anchor, moments: Moments) -> CalibratedAnchor:
    """What the moments of one anchor say."""
    if not moments.gram.any():
        raise ValueError(
            f"the anchor {anchor.source} gives the reference's outputs on every pair, so there is "
            "nothing to calibrate: give an aligned model"
        )
    card = anchor.card
    beta = None
    if card is not None and card.beta_convention == BETA_CONVENTION:
        beta = card.beta
    return CalibratedAnchor(
        name=anchor.source,
        beta=beta,
        beta_eff=effective_beta(moments),
        trajectory_beta=trajectory_beta(moments),
        accuracy=mean_estimate(pair_accuracies(moments, [1.0])),
        best_lam=None if beta is None else best_lam(moments, beta),
        loss=None if beta is None else mean_estimate(pair_losses(moments, [1.0], beta)),
        best_loss=None if beta is None else loss_at_best_lam(moments, beta),
        moments=moments,
    )
