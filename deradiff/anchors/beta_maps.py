"""From the beta that is to be imitated to lambda, and back: by the paper's law, or by preferences.

The paper's law is lam = beta / target. On held-out pairs another lambda may have the lowest loss at
the target, where the anchor is stronger or weaker than its beta says. `deradiff calibrate` writes
such lambdas onto the anchor's card.

It imports nothing heavy: configs read the words before torch is loaded.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from deradiff.command_line import command_of

if TYPE_CHECKING:  # not imported when a command starts
    from deradiff.anchors.anchor import Anchor

PAPER = "paper"
PREFERENCE = "preference"
MAPS = (PAPER, PREFERENCE)

POINT = "best_lam_at_"
"""How the names of a card's points begin; the beta follows."""


ROUNDING = 1e-9
"""By so much a logarithm may be off."""


class PreferenceMap:
    """lam*(beta), the lambda of the lowest held-out loss, on lines in logarithms between points.

    Args:
        anchor: whose card knows points.

    Raises:
        ValueError: where the card knows fewer than two.
    """

    def __init__(self, anchor: Anchor) -> None:
        self.anchor = anchor.source
        calibration = anchor.card.calibration if anchor.card else None
        points = {}
        for name, lam in (calibration or {}).items():
            if name.startswith(POINT) and lam > 0:
                points[float(name.removeprefix(POINT))] = lam
        if len(points) < 2:
            raise ValueError(
                f"the card of {self.anchor} does not say which lambda is best at which beta: type "
                f"{command_of('calibrate')} anchor={self.anchor} pairs=..., or give "
                f"targets_by={PAPER}"
            )
        self.betas = sorted(points)
        # A weaker alignment is a smaller lambda, whatever the points' noise says.
        lams = [points[beta] for beta in self.betas]
        self._log_betas = [math.log(beta) for beta in self.betas]
        self._log_lams = [math.log(lam) for lam in accumulate(lams, min)]

    def lam_of(self, target: float) -> float:
        """The lambda of a target.

        Args:
            target: the beta that is to be imitated.

        Raises:
            ValueError: for a beta that is not between the points.
        """
        if not self.betas[0] <= target <= self.betas[-1]:
            raise ValueError(
                f"the card of {self.anchor} knows the best lambda for betas from "
                f"{self.betas[0]:g} to {self.betas[-1]:g}, and {target:g} is none of them: give "
                f"targets_by={PAPER}, or another target"
            )
        return math.exp(on_lines(math.log(target), self._log_betas, self._log_lams))

    def target_of(self, lam: float) -> float | None:
        """The beta that a lambda imitates; None: it is not between the points.

        Args:
            lam: above 0.
        """
        log_lam = math.log(lam)
        if not self._log_lams[-1] - ROUNDING <= log_lam <= self._log_lams[0] + ROUNDING:
            return None
        # Lambda falls where beta rises.
        return math.exp(on_lines(log_lam, self._log_lams[::-1], self._log_betas[::-1]))


def on_lines(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The value at x on the lines through points; that of the nearest end outside of them.

    Args:
        x: where.
        xs: of the points, in rising order.
        ys: of the points.
    """
    after = min(max(bisect_right(xs, x), 1), len(xs) - 1)
    left, right = xs[after - 1], xs[after]
    share = 0.0 if left == right else min(max((x - left) / (right - left), 0.0), 1.0)
    return ys[after - 1] + share * (ys[after] - ys[after - 1])
