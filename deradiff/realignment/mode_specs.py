"""The modes of `realign` as they describe themselves: what belongs to each, and what it costs.

Everything that lists modes reads this table: `realign` and its checks, the sample stage's config,
the labels of the manifest and of the evaluation. It imports nothing heavy, because configs read it
before torch is loaded. The classes that do the work are in `deradiff.realignment.modes`.

A new mode is a row here, and a class with a `from_parts` in `modes.MODE_TYPES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class ModeSpec:
    """What a mode of `realign` says of itself.

    Attributes:
        name: the value of `mode`.
        summary: what it evaluates, in a sentence.
        evaluations: network evaluations a step, in words.
        both_networks: it evaluates reference and anchor at every step, as particles and `batched`
            require.
        several_anchors: it takes more than one anchor.
        takes_trust_region: it knows the difference that a trust region bounds.
        option: the option of `realign` that belongs to this mode alone; None: there is none.
        separate_networks: it evaluates an anchor's own network, on which a LoRA that the user
            loaded into the pipeline does not act.
        knows_path_kl: it knows the path KL without a further evaluation, except at lambda 1.
    """

    name: str
    summary: str
    evaluations: str
    both_networks: bool = False
    several_anchors: bool = True
    takes_trust_region: bool = False
    option: str | None = None
    separate_networks: bool = True
    knows_path_kl: bool = True


EXACT = ModeSpec(
    name="exact",
    summary="the outputs of reference and anchor, mixed at every step",
    evaluations="2 (1 at lambda 0 and 1)",
    both_networks=True,
    takes_trust_region=True,
)
REUSE = ModeSpec(
    name="reuse",
    summary="their difference at every k-th step, extrapolated in between",
    evaluations="1 + 1/k",
    several_anchors=False,
    takes_trust_region=True,
    option="every",
)
WEIGHTS = ModeSpec(
    name="weights",
    summary="one network at theta_ref + lam (theta_anchor - theta_ref)",
    evaluations="1",
    separate_networks=False,
    knows_path_kl=False,
)
MODES = {spec.name: spec for spec in (EXACT, REUSE, WEIGHTS)}

PARTICLES = "particles"
"""What the manifest and the evaluation call mode `exact` with more than one particle."""

DETAILS = ("every", "particles")
"""Options whose number stands in a mode's label, such as `reuse 4`."""


def check_options(
    mode: str,
    *,
    every: int = 1,
    particles: int = 1,
    trust_region: float | None = None,
    batched: bool = False,
    anchors: int = 1,
) -> None:
    """Check that a mode and its options go together, before an anchor is looked for.

    Args:
        mode: a key of `MODES`.
        every: of mode `reuse`.
        particles: of an image.
        trust_region: in nats; None: none.
        batched: whether reference and anchor are one batch.
        anchors: how many there are.

    Raises:
        ValueError: in one sentence that names the option.
    """
    if mode not in MODES:
        *others, last = MODES
        raise ValueError(f"mode must be {', '.join(others)} or {last}, not {mode!r}")
    for name, count in (("every", every), ("particles", particles)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {count!r}")
    if trust_region is not None and not trust_region > 0:
        raise ValueError(f"trust_region must be a number of nats above 0, not {trust_region!r}")
    _check_combination(MODES[mode], particles, trust_region, batched, anchors)


def _check_combination(
    spec: ModeSpec, particles: int, trust_region: float | None, batched: bool, anchors: int
) -> None:
    """Raises ValueError where an option does not fit the mode or the number of anchors."""
    if particles > 1 and not spec.both_networks:
        raise ValueError(
            f"particles need both networks at every step: use mode=exact with "
            f"particles={particles}, not {spec.name}"
        )
    if batched and not spec.both_networks:
        raise ValueError(
            f"batched evaluates both networks at every step: use mode=exact, not {spec.name}"
        )
    if anchors > 1 and not spec.several_anchors:
        raise ValueError(f"mode {spec.name} is for one anchor, and there are {anchors}")
    if trust_region is None:
        return
    if anchors > 1:
        raise ValueError(f"trust_region is for one anchor, and there are {anchors}")
    if not spec.takes_trust_region:
        raise ValueError(
            "trust_region needs the difference of both networks: use mode=exact or mode=reuse, "
            f"not {spec.name}"
        )


def shown_mode(mode: str, particles: int) -> str:
    """The mode as the manifest names it: `particles` for mode exact with more than one."""
    return PARTICLES if particles > 1 else mode


def mode_label(record: Mapping[str, Any]) -> str:
    """A mode with its settings: `reuse 4`, `particles 4`, `exact within 1 nats`.

    Images that differ in it come from different models.

    Args:
        record: a manifest's line, with `mode` and its options.
    """
    label = str(record["mode"])
    for option in DETAILS:
        value = record.get(option)
        if is_number(value):
            label += f" {value:g}"
    nats = record.get("trust_region")
    if is_number(nats):
        label += f" within {nats:g} nats"
    return label


def mode_of_label(label: str) -> str:
    """The mode that `mode_label` begins with."""
    return label.split()[0]


def is_number(value: Any) -> bool:
    """Whether a value of a manifest is a number; None means that an option was not used."""
    return isinstance(value, Real) and not isinstance(value, bool)
