"""The modes of `realign` by name, and what is known of each. Light: it imports no torch.

A mode is a way to evaluate the realigned denoiser. `realign` and its checks, the sample stage's
config and messages, the names and line styles of the evaluation, and the benchmarks read this
table.

A new mode is a class (see `deradiff.realignment.modes.Mode`) and a row of MODES; where it has a
setting of its own, that is an argument of `realign` and a key of the sample stage's config.
`tests/realignment/test_registry.py` says what else is missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

LineStyle = str | tuple[int, tuple[int, ...]]
"""A name, or an offset with lengths of dashes and gaps, as matplotlib takes them."""


@dataclass(frozen=True)
class ModeLabel:
    """How messages, tables and figures show a mode.

    Attributes:
        line_style: matplotlib's style of its lines.
        setting: the number that tells two runs of this mode apart: an argument of `realign`, a key
            of the sample stage's config and of the manifest; None: it has none.
        setting_text: how a message says the setting, with `{}` for its value.
    """

    line_style: LineStyle
    setting: str | None = None
    setting_text: str = ""


@dataclass(frozen=True)
class ModeSpec:
    """What is known of a mode before anything is loaded.

    Attributes:
        implementation: its class, as `module:Class`.
        evaluations: network evaluations a step where lambda is neither 0 nor 1, as the docs say it.
        label: how it is shown.
        particles: it goes together with `particles` above 1.
        batched: it goes together with `batched=True`.
        trust_region: it goes together with a trust region.
        several_anchors: it can mix more than one anchor.
        branches: it takes a lambda for each branch of guidance.
        sums_weights: it evaluates one network, at a sum of weights; those of a full anchor are only
            read.
        measures_path_kl: it evaluates the reference anyway at every lambda between 0 and 1, so that
            the path KL is measured at next to no cost. The sample stage then measures it unless
            told otherwise.
    """

    implementation: str
    evaluations: str
    label: ModeLabel
    particles: bool = False
    batched: bool = False
    trust_region: bool = False
    several_anchors: bool = True
    branches: bool = False
    sums_weights: bool = False
    measures_path_kl: bool = True

    def load(self) -> Any:
        """Import the class, a `deradiff.realignment.modes.Mode`."""
        module, _, name = self.implementation.partition(":")
        return getattr(import_module(module), name)


MODES = {
    "exact": ModeSpec(
        implementation="deradiff.realignment.modes:Exact",
        evaluations="2",
        label=ModeLabel(line_style="-"),
        particles=True,
        batched=True,
        trust_region=True,
        branches=True,
    ),
    "reuse": ModeSpec(
        implementation="deradiff.realignment.modes:Reuse",
        evaluations="1 + 1/k",
        label=ModeLabel(line_style=":", setting="every", setting_text="every {} steps"),
        trust_region=True,
        several_anchors=False,
    ),
    "weights": ModeSpec(
        implementation="deradiff.realignment.modes:Weights",
        evaluations="1",
        label=ModeLabel(line_style="--"),
        sums_weights=True,
        measures_path_kl=False,
    ),
    "sampled": ModeSpec(
        implementation="deradiff.realignment.modes:Sampled",
        evaluations="1",
        label=ModeLabel(line_style=(0, (3, 1, 1, 1, 1, 1))),
        measures_path_kl=False,
    ),
}

BRANCHES = ("both", "conditional", "unconditional")
"""The branches of guidance that lambda may act on."""

MEMORY = ("auto", "low", "high")
"""How much memory a LoRA anchor may take for weights of its own."""

PARTICLES = "particles"
"""What a manifest calls a mode that was sampled with more than one particle an image."""

LABELS = {name: spec.label for name, spec in MODES.items()}
LABELS[PARTICLES] = ModeLabel(line_style="-.", setting="particles", setting_text="{} an image")
"""How each mode is shown, by its name in a manifest."""

SETTINGS = tuple(label.setting for label in LABELS.values() if label.setting)
"""The keys of a manifest that hold the setting of a mode."""

NEEDS = {
    "particles": "needs both networks at every step",
    "batched": "needs both networks at every step",
    "trust_region": "needs the difference of both networks",
}
"""The options of `realign` that some modes do not go together with, and why."""


def modes_with(option: str) -> list[str]:
    """The modes that go together with an option, a key of NEEDS."""
    return [name for name, spec in MODES.items() if getattr(spec, option)]


def unsupported_option(
    mode: str, particles: int, batched: bool, trust_region: float | None
) -> str | None:
    """The first option that is in use and that the mode does not go together with; None: all do.

    Args:
        mode: a key of MODES.
        particles: an image; 1: none.
        batched: whether both networks run as one batch.
        trust_region: in nats; None: none.
    """
    in_use = {
        "particles": particles > 1,
        "batched": batched,
        "trust_region": trust_region is not None,
    }
    for option in NEEDS:
        if in_use[option] and not getattr(MODES[mode], option):
            return option
    return None


def manifest_mode(mode: str, particles: int) -> str:
    """The name of a mode in a manifest, a key of LABELS."""
    return PARTICLES if particles > 1 else mode


def label_of(name: str) -> ModeLabel:
    """The label of a mode.

    Args:
        name: its name in a manifest, which its settings may follow (`reuse 4`). A mode of another
            version is shown with dots.
    """
    return LABELS.get(name.split()[0], ModeLabel(line_style=":"))


def full_name(record: Mapping[str, Any]) -> str:
    """A mode with its settings, such as `reuse 4` or `exact within 1 nats`.

    Images of different full names come from different models.

    Args:
        record: a line of a manifest.
    """
    words = [record["mode"]]
    for setting in SETTINGS:
        if _is_number(record.get(setting)):
            words.append(f"{record[setting]:g}")
    if record.get("branch"):
        words.append(f"{record['branch']} branch")
    if record.get("lam_schedule"):
        words.append(f"schedule {json.dumps(record['lam_schedule'])}")
    if _is_number(record.get("trust_region")):
        words.append(f"within {record['trust_region']:g} nats")
    return " ".join(words)


def is_one_network(record: Mapping[str, Any]) -> bool:
    """Whether an image is the reference's or an anchor's own, so that every mode gives the same.

    Args:
        record: a line of a manifest.
    """
    if record["lam"] == 0:
        return True
    is_plain = not (record.get("branch") or record.get("lam_schedule") or record.get("shares"))
    return record["lam"] == 1 and is_plain


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
