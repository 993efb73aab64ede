"""The figure of a calibration: held-out loss over lambda."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deradiff.calibration.calibrate import CalibratedAnchor, Calibration
from deradiff.calibration.estimates import LN_2, mean_estimate, pair_losses
from deradiff.evaluation.figures.style import STYLE, line_style

LARGEST_LAM = 1.5
POINTS = 61
MOST_BETAS = 6
"""As many as there are colours."""

TOP = 0.9
"""Of the axis of losses: what lies above is worse than guessing."""

SIZE = (4.2, 3.2)
"""Inches of one panel."""


def loss_over_lambda(found: Calibration, betas: Sequence[float]) -> Figure:
    """A panel an anchor, and a line a beta; a point where the loss is lowest.

    Args:
        found: the calibration.
        betas: of the lines, besides the anchors' own.
    """
    with matplotlib.rc_context(STYLE):
        count = len(found.anchors)
        figure = Figure(figsize=(SIZE[0] * count, SIZE[1]), layout="constrained")
        panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
        for panel, anchor in zip(panels, found.anchors):
            _draw(panel, anchor, betas)
        panels[0].set_ylabel("held-out loss")
    return figure


def _draw(panel: Axes, anchor: CalibratedAnchor, betas: Sequence[float]) -> None:
    """The lines of one anchor."""
    own = [] if anchor.beta is None else [anchor.beta]
    shown = sorted({*betas, *own})[:MOST_BETAS]
    lams = np.linspace(0.0, LARGEST_LAM, POINTS)
    for index, beta in enumerate(shown):
        style = line_style(index)
        losses = [mean_estimate(pair_losses(anchor.moments, [lam], beta)) for lam in lams]
        values = np.array([loss.value for loss in losses])
        name = f"beta {beta:g}" + (" (its own)" if beta in own else "")
        panel.plot(lams, values, color=style["color"], label=name)
        low = [loss.low for loss in losses]
        high = [loss.high for loss in losses]
        panel.fill_between(lams, low, high, color=style["color"], alpha=0.12, lw=0)

        # lam*, with its interval.
        best = anchor.best_lam_at(beta)
        if best.value <= LARGEST_LAM:
            loss = mean_estimate(pair_losses(anchor.moments, [best.value], beta)).value
            reach = [[best.value - best.low], [best.high - best.value]]
            panel.errorbar(
                [best.value],
                [loss],
                xerr=reach,
                color=style["color"],
                marker=style["marker"],
                capsize=3,
            )
    panel.axhline(LN_2, color="0.5", lw=0.8, ls=":")
    panel.annotate("the reference", (LARGEST_LAM, LN_2), ha="right", va="bottom", fontsize=8)
    panel.set_xlim(0, LARGEST_LAM)
    bottom, top = panel.get_ylim()
    panel.set_ylim(bottom, min(top, TOP))
    panel.set_xlabel("lambda")
    panel.set_title(anchor.name.rstrip("/").removesuffix("/anchor").rpartition("/")[2])
    panel.legend(fontsize=8)
