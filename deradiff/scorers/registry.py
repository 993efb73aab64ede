"""The scorers by name, and what of each can be set. It imports nothing heavy.

A scorer of another network is a module of this folder with `check(spec)` and `load(spec, device)`,
a row here, and a file in configs/scorers.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from deradiff.scorers.published import PUBLISHED_CLIPS
from deradiff.scorers.spec import ScorerSpec


@dataclass(frozen=True)
class ScorerEntry:
    """A scorer that deradiff has.

    Attributes:
        module: where its `check(spec)` and `load(spec, device)` are.
        settings: the fields of a `ScorerSpec` that it has beside its name.
        is_formula: it is a formula, and not a network.
        reads_scene: it judges by the scene that a caption of the shapes world names, and so has no
            score for other prompts.
        embeds_images: it is an `EmbeddingScorer`: its network gives an image a vector.
    """

    module: str
    settings: tuple[str, ...] = ()
    is_formula: bool = False
    reads_scene: bool = False
    embeds_images: bool = False


CLIP_SETTINGS = ("checkpoint", "tokenizer", "model_config")
CLIP_ENTRY = ScorerEntry("deradiff.scorers.clip", CLIP_SETTINGS, embeds_images=True)
FORMULA_ENTRY = ScorerEntry("deradiff.scorers.formulas", is_formula=True)
USER_FILE = ScorerEntry("deradiff.scorers.user_file", ("file",))
"""A scorer of the user's own."""

SCORERS: dict[str, ScorerEntry] = {
    **dict.fromkeys(PUBLISHED_CLIPS, CLIP_ENTRY),
    "aesthetic": ScorerEntry(
        "deradiff.scorers.aesthetic", (*CLIP_SETTINGS, "head"), embeds_images=True
    ),
    "imagereward": ScorerEntry("deradiff.scorers.imagereward", ("checkpoint", "tokenizer")),
    "judge": ScorerEntry("deradiff.scorers.judge", ("endpoint", "rubric")),
    "vivid": ScorerEntry("deradiff.scorers.formulas", is_formula=True, reads_scene=True),
    "crisp": FORMULA_ENTRY,
    "colourful": FORMULA_ENTRY,
}

SETTINGS = ("checkpoint", "tokenizer", "model_config", "head", "endpoint", "rubric")
"""The fields of a `ScorerSpec` that name a file or a server of deradiff's own scorers."""


def entry_of(spec: ScorerSpec) -> ScorerEntry:
    """The entry of a spec's scorer.

    Raises:
        ValueError: for an unknown name, and for a setting that the scorer does not have.
    """
    given = [name for name in SETTINGS if getattr(spec, name) is not None]
    if spec.file is not None:
        _check_user_file(spec, given)
        return USER_FILE
    if spec.name not in SCORERS:
        raise ValueError(
            f"there is no scorer {spec.name!r}; the scorers are {', '.join(SCORERS)}, and one of "
            "your own by its file, file=<yours>.py"
        )
    entry = SCORERS[spec.name]
    strange = [name for name in given if name not in entry.settings]
    if strange:
        what = "is a formula, not a network"
        if not entry.is_formula:
            what = f"has no {' or '.join(strange)}"
        raise ValueError(f"the scorer {spec.name} {what}: leave out {' and '.join(strange)}")
    return entry


def _check_user_file(spec: ScorerSpec, given: list[str]) -> None:
    if spec.name in SCORERS:
        raise ValueError(
            f"{spec.name} is a scorer of deradiff's: give the one in {spec.file} a name of its own"
        )
    if given:
        raise ValueError(
            f"the scorer in {spec.file} loads its weights itself: leave out {' and '.join(given)}"
        )


def module_of(entry: ScorerEntry) -> Any:
    """The module of a scorer, imported now: torch loads with it."""
    return importlib.import_module(entry.module)
