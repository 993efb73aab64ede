"""What the anchors cost and what realignment saves, from the anchors' cards."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache

import pandas as pd

from deradiff.anchors.anchor import AnchorCard
from deradiff.evaluation.pairing import ANCHOR, Cell, short
from deradiff.evaluation.tables.table import Table, number, table
from deradiff.models.flops import savings
from deradiff.models.published import PublishedCost, published_dpo

COMPUTE = """From the anchors' cards. Device-hours: wall-clock time times devices. FLOPs: of the denoiser, counted on its config; a
multiply-add is 2."""


def compute(cards: dict[str, AnchorCard]) -> Table:
    """What each anchor cost, from its card."""
    kept = (
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
    data = pd.DataFrame(
        [
            {"anchor": anchor} | {key: getattr(card, key) for key in kept}
            for anchor, card in cards.items()
        ]
    )
    shown = [
        {
            "anchor": short(anchor),
            "method": card.method,
            "beta": number(card.beta),
            "training seed": str(card.seed),
            "steps": number(card.steps),
            "pairs": number(card.pairs_seen),
            "device": card.device,
            "device-hours": number(card.gpu_hours),
            "FLOPs": f"{card.flops:.3g}",
        }
        for anchor, card in cards.items()
    ]
    return table("compute", "What the anchors cost", COMPUTE, data, shown)


SAVINGS = """Training alone: one anchor, realigned to each target, beside the anchor and every target trained from scratch. Sampling is
not counted: mode exact evaluates two denoisers a step (reference and anchor), mode weights one."""


def saved(cells: list[Cell], cards: dict[str, AnchorCard]) -> Table:
    """For each realigned anchor: what training its targets too has cost, in the cards' own hours and FLOPs."""
    rows, shown = [], []
    for anchor in dict.fromkeys(cell.realigned[ANCHOR] for cell in cells):
        targets = {
            cell.beta_target: cell.target[ANCHOR]
            for cell in cells
            if cell.realigned[ANCHOR] == anchor
        }
        if not {anchor, *targets.values()} <= set(cards):
            continue
        hours = savings(cards[anchor].gpu_hours, [cards[t].gpu_hours for t in targets.values()])
        flops = savings(cards[anchor].flops, [cards[t].flops for t in targets.values()])
        own = {"anchor": anchor, "beta": cards[anchor].beta, "targets": len(targets)}
        rows.append(
            own
            | {f"hours_{k}": v for k, v in asdict(hours).items()}
            | {f"flops_{k}": v for k, v in asdict(flops).items()}
        )
        shown.append(
            {
                "anchor": short(anchor),
                "targets": str(len(targets)),
                "device-hours, all from scratch": number(hours.from_scratch),
                "device-hours, one anchor": number(hours.anchor),
                "hours saved, %": number(hours.percent),
                "FLOPs, all from scratch": f"{flops.from_scratch:.3g}",
                "FLOPs, one anchor": f"{flops.anchor:.3g}",
                "FLOPs saved, %": number(flops.percent),
            }
        )
    return table("savings", "What realignment saves", SAVINGS, pd.DataFrame(rows), shown)


PUBLISHED = """What the paper states for one SDXL anchor beside what its recipe counts to. {why} One anchor in place of six betas saves
five sixths of either."""

_published = lru_cache(published_dpo)


def published() -> Table:
    """The paper's SDXL anchor: its GPU-hours and FLOPs as stated, and the FLOPs of its recipe by the count of the other tables."""
    paper: PublishedCost = _published()
    data = pd.DataFrame([asdict(paper)]).drop(columns="why")
    shown = {
        "anchor": "SDXL, the paper's",
        "GPU-hours, stated": number(paper.gpu_hours),
        "FLOPs, stated": f"{paper.published_flops:.4g}",
        "FLOPs, counted": f"{paper.flops:.4g}",
        "counted / stated": number(paper.ratio),
        "with checkpointing and autoencoder": f"{paper.with_everything:.4g}",
    }
    return table(
        "published",
        "The paper's anchor, by the same count",
        PUBLISHED.format(why=paper.why),
        data,
        [shown],
    )
