"""What a check finds, and the one table of all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

OK = "ok"
FAILED = "FAILED"
CUT = "cut"
NOT_RUN = "not run"
"""How a row ends. `cut`: its time was not left; `not run`: it cannot run here."""

HEAD = ("on", "check", "status", "s", "of", "x", "MFU", "of peak", "busy", "GB", "note")


@dataclass(frozen=True)
class Card:
    """The device that was measured.

    Attributes:
        name: as the device reports it.
        memory: bytes.
        rate: FLOP/s that large matrix products in bfloat16 reach.
        peak: FLOP/s of its data sheet; None: unknown.
    """

    name: str
    memory: float
    rate: float
    peak: float | None


@dataclass(frozen=True)
class Finding:
    """What a check finds.

    Attributes:
        seconds: measured.
        unit: what takes them: `image`, `step`.
        forwards: evaluations of the denoiser on one image that are done in these seconds; passes
            that are repeated to save memory do not count.
        encoded: images that the autoencoder encodes in these seconds.
        beside: the check of the same group whose seconds these are compared with.
        busy: the share of the time in which the GPU computes.
        memory: the most bytes that the device held.
        note: what else there is to say.
        problem: what is wrong; "": nothing is.
        card: of the check that measures the card.
    """

    seconds: float | None = None
    unit: str = ""
    forwards: float = 0.0
    encoded: float = 0.0
    beside: str = ""
    busy: float | None = None
    memory: float | None = None
    note: str = ""
    problem: str = ""
    card: Card | None = None


@dataclass(frozen=True)
class Row:
    """One check and how it ended.

    Attributes:
        group: what it ran on, such as `sdxl bf16`.
        check: its name.
        status: OK, FAILED, CUT or NOT_RUN.
        finding: what it found.
        took: seconds that the check took in all.
    """

    group: str
    check: str
    status: str
    finding: Finding = field(default_factory=Finding)
    took: float = 0.0

    @property
    def why(self) -> str:
        """The note, or what is wrong."""
        return self.finding.problem or self.finding.note

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Row:
        """The row that `asdict` made these values of."""
        finding = dict(values["finding"])
        if finding["card"]:
            finding["card"] = Card(**finding["card"])
        return cls(**{**values, "finding": Finding(**finding)})


@dataclass(frozen=True)
class Costs:
    """FLOPs of a pipeline's networks on one image.

    Attributes:
        forward: of the denoiser.
        encoding: of the autoencoder.
    """

    forward: float
    encoding: float


def records(rows: Sequence[Row], costs: Mapping[str, Costs]) -> list[dict[str, Any]]:
    """The rows as they are written to JSON: what was measured, and the shares that follow from it.

    Args:
        rows: of all groups.
        costs: by network, the first word of a group.
    """
    cards = {row.group: row.finding.card for row in rows if row.finding.card}
    seconds = {(row.group, row.check): row.finding.seconds for row in rows}
    found = []
    for row in rows:
        finding = row.finding
        record = asdict(row)
        record |= {"ratio": None, "mfu": None, "share_of_peak": None}
        found.append(record)
        if not finding.seconds:
            continue

        # The time beside another check's.
        other = seconds.get((row.group, finding.beside))
        if other:
            record["ratio"] = finding.seconds / other

        # The FLOPs of a second, beside what the card reached and what its data sheet says.
        cost = costs[row.group.split()[0]]
        flops = finding.forwards * cost.forward + finding.encoded * cost.encoding
        card = cards.get(row.group)
        if card and flops:
            record["mfu"] = flops / finding.seconds / card.rate
            if card.peak:
                record["share_of_peak"] = flops / finding.seconds / card.peak
    return found


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """The table of `records`."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += [markdown_line(record) for record in found]
    return "\n".join(lines)


def markdown_line(record: Mapping[str, Any]) -> str:
    """One line of the table."""
    finding = record["finding"]
    cells = [
        record["group"],
        record["check"],
        record["status"],
        _number(finding["seconds"], "{:.3g}"),
        finding["unit"],
        _number(record["ratio"], "{:.2f}"),
        _number(record["mfu"], "{:.1%}"),
        _number(record["share_of_peak"], "{:.1%}"),
        _number(finding["busy"], "{:.0%}"),
        _number(finding["memory"], "{:.1f}", 1e9),
        (finding["problem"] or finding["note"]).replace("|", "/"),
    ]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    """A number as text; nothing where there is none."""
    return "" if value is None else form.format(value / unit)
