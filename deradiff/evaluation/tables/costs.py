"""What the anchors cost and what realignment saves, from the anchors' cards."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache

from deradiff.anchors.anchor import AnchorCard
from deradiff.anchors.mixtures import anchor_name
from deradiff.evaluation.comparison import Comparison
from deradiff.evaluation.pairing import Cards
from deradiff.evaluation.tables.table import Column, ResultTable, Row
from deradiff.models.flops import Savings, savings
from deradiff.models.published import PublishedCost, published_dpo

COMPUTE_NOTE = """From the anchors' cards. Device-hours: wall-clock time times devices. FLOPs: of
the denoiser, counted on its config; a multiply-add is 2."""

SAVINGS_NOTE = """Training alone: one anchor, realigned to each target, beside the anchor and every
target trained from scratch. Sampling is not counted: mode exact evaluates two denoisers a step
(reference and anchor), mode weights one."""

PUBLISHED_NOTE = """What the paper states for one SDXL anchor beside what its recipe counts to.
{why} One anchor in place of six betas saves five sixths of either."""

CARD_VALUES = (
    "method",
    "beta",
    "seed",
    "steps",
    "pairs_seen",
    "dataset",
    "device",
    "gpu_hours",
    "flops",
)


def _flops_column(header: str, key: str) -> Column:
    """A column of FLOPs."""
    return Column(header, text=lambda row: f"{row[key]:.3g}")


NAME = Column("anchor", text=lambda row: anchor_name(row["anchor"]))


def costs_of_anchors(comparison: Comparison) -> ResultTable:
    """What each anchor cost, from its card: a row an anchor."""
    rows = []
    for anchor, card in comparison.cards.items():
        row: Row = {"anchor": anchor}
        for key in CARD_VALUES:
            row[key] = getattr(card, key)
        rows.append(row)
    columns = (
        NAME,
        Column("method"),
        Column("beta"),
        Column("training seed", text=lambda row: str(row["seed"])),
        Column("steps"),
        Column("pairs", "pairs_seen"),
        Column("device"),
        Column("device-hours", "gpu_hours"),
        _flops_column("FLOPs", "flops"),
    )
    return ResultTable.from_rows("compute", "What the anchors cost", COMPUTE_NOTE, rows, columns)


def savings_of_anchors(comparison: Comparison) -> ResultTable:
    """What training the targets, too, has cost: a row for each realigned anchor.

    An anchor has a row where it and all of its targets have cards.
    """
    # Each anchor's targets, by beta
    targets_of: dict[str, dict[float, str]] = {}
    for cell in comparison.cells:
        targets = targets_of.setdefault(cell.realigned.anchor, {})
        targets[cell.beta_target] = cell.target.anchor

    cards = comparison.cards
    rows = []
    for anchor, targets in targets_of.items():
        if {anchor, *targets.values()} <= set(cards):
            rows.append(_savings_row(anchor, list(targets.values()), cards))
    columns = (
        NAME,
        Column("targets", text=lambda row: str(row["targets"])),
        Column("device-hours, all from scratch", "hours_from_scratch"),
        Column("device-hours, one anchor", "hours_anchor"),
        Column("hours saved, %", "hours_percent"),
        _flops_column("FLOPs, all from scratch", "flops_from_scratch"),
        _flops_column("FLOPs, one anchor", "flops_anchor"),
        Column("FLOPs saved, %", "flops_percent"),
    )
    return ResultTable.from_rows("savings", "What realignment saves", SAVINGS_NOTE, rows, columns)


def _savings_row(anchor: str, targets: list[str], cards: Cards) -> Row:
    card = cards[anchor]
    others: list[AnchorCard] = [cards[target] for target in targets]
    row: Row = {"anchor": anchor, "beta": card.beta, "targets": len(targets)}
    hours = savings(card.gpu_hours, [other.gpu_hours for other in others])
    flops = savings(card.flops, [other.flops for other in others])
    return row | _prefixed("hours", hours) | _prefixed("flops", flops)


def _prefixed(unit: str, amounts: Savings) -> Row:
    """The amounts as `<unit>_from_scratch` and so on."""
    return {f"{unit}_{key}": value for key, value in asdict(amounts).items()}


def _flops_with_everything(row: Row) -> str:
    return f"{row['with_everything']:.4g}"


@lru_cache
def _published_cost() -> PublishedCost:
    return published_dpo()


def published_cost(comparison: Comparison | None = None) -> ResultTable:
    """The paper's SDXL anchor: GPU-hours and FLOPs as stated, and the FLOPs of its recipe.

    Args:
        comparison: not needed; the paper's numbers are the same in every evaluation.
    """
    cost = _published_cost()
    row = asdict(cost)
    why = row.pop("why")
    columns = (
        Column("anchor", text=lambda row: "SDXL, the paper's"),
        Column("GPU-hours, stated", "gpu_hours"),
        Column("FLOPs, stated", text=lambda row: f"{row['published_flops']:.4g}"),
        Column("FLOPs, counted", text=lambda row: f"{row['flops']:.4g}"),
        Column("counted / stated", "ratio"),
        Column("with checkpointing and autoencoder", text=_flops_with_everything),
    )
    note = PUBLISHED_NOTE.format(why=why)
    title = "The paper's anchor, by the same count"
    return ResultTable.from_rows("published", title, note, [row], columns)
