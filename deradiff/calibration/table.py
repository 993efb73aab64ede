"""The table of a calibration, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence

from deradiff.calibration.calibrate import Calibration
from deradiff.calibration.estimates import LN_2
from deradiff.evaluation.tables.table import Column, ResultTable

NOTE = f"""Held-out pairs: the loss of Diffusion-DPO at that beta (the reference has {LN_2:.3f}),
the share of pairs whose winner the model prefers more than the reference does, and the winner's
error less the reference's. The closed form of one pass (docs/calibration.md); 95 % intervals by
bootstrap over pairs."""


def loss_table(found: Calibration, lams: Sequence[float], betas: Sequence[float]) -> ResultTable:
    """Loss, accuracy and the winner's error over lambda and beta.

    Args:
        found: the calibration.
        lams: lambdas of the rows.
        betas: betas of the rows, besides the anchors' own.
    """
    columns = [
        Column("anchor"),
        Column("beta"),
        Column("lam"),
        Column("held-out loss", "loss"),
        Column("accuracy"),
        Column("winner's error", "winner_error"),
    ]
    title = "What the anchors are on held-out pairs"
    return ResultTable.from_rows("calibration", title, NOTE, found.rows(lams, betas), columns)
