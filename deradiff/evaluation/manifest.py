"""The manifest: a line an image, written by the sample stage and read here.

`ImageRecord` is its one schema. Reading checks every line, every image, and that what is compared
belongs together.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pandas as pd

from deradiff.anchors.anchor import AnchorCard, cards_digest, read_card
from deradiff.command_line import command_of
from deradiff.digests import unsealed
from deradiff.models.weight_headers import short_reason
from deradiff.realignment.registry import SETTINGS, full_name, is_one_network
from deradiff.text_files import parse_json, read_text
from deradiff.texts import is_encodable

MANIFEST = "manifest.jsonl"

SAMPLING_COLUMNS = ["sampler", "eta", "steps", "guidance_scale", "height", "width"]
"""How images were sampled. Images that differ in any of these are never compared."""

OPTIONAL = {
    "eta": 0.0,
    "evaluations": None,
    "shares": None,
    "cards": None,
    "base_model": None,
    "trust_region": None,
    "branch": None,
    "lam_schedule": None,
    "generator_seed": None,
    "timesteps_sha256": None,
    "seconds": None,
    "ess": None,
} | dict.fromkeys(SETTINGS)
"""Keys that older manifests lack, with what they mean there."""

POSITIVE = ("steps", "height", "width")
"""Keys whose values are at least 1."""


@dataclass(kw_only=True)
class ImageRecord:
    """One image of a sample run: what it is, how it was made, and what it cost.

    Beside these keys stand those of modes' settings (`deradiff.realignment.registry.SETTINGS`),
    which are numbers or None. A key that is none of all these, as another version may have it, is
    left out when a manifest is read.

    Attributes:
        image: the file, relative to the run directory.
        prompt_id: the prompt's name, a function of its text.
        prompt: the prompt.
        seed: the user's seed.
        anchor: the anchor as the user named it, or the name of a mixture of several.
        shares: of a mixture's anchors, by name (`deradiff.anchors.mixtures`); None: one anchor.
        beta: the anchor's; None where no card says it.
        lam: lambda.
        beta_target: beta / lam; None at lam 0, without a beta, and where no model is imitated.
        mode: `exact`, `reuse`, `weights`, `sampled`, or `particles`.
        sampler: a key of `deradiff.method.samplers.SAMPLERS`.
        eta: of DDIM.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance.
        height: in pixels.
        width: in pixels.
        path_kl: to the reference's chain, in nats; None where it is not known.
        evaluations: network evaluations a step.
        sha256: of the image's file.
        cards: digest of the cards of its anchors (`deradiff.anchors.anchor.cards_digest`); None:
            they have none, or it is not known.
        base_model: the reference, as the user named it.
        trust_region: in nats; None: none.
        branch: of guidance, on which alone lambda acts; None: on both.
        lam_schedule: what lambda was multiplied by in time (`deradiff.method.lambdas`); None: 1.
        generator_seed: of the image's noise.
        timesteps_sha256: digest of the timesteps; images on unlike ones are not compared.
        seconds: that it took.
        ess: effective number of its particles at the end; None: one chain.
    """

    image: str
    prompt_id: str
    prompt: str
    seed: int
    anchor: str
    shares: dict | None  # type: ignore[type-arg]
    beta: float | None
    lam: float
    beta_target: float | None
    mode: str
    sampler: str
    eta: float
    steps: int
    guidance_scale: float
    height: int
    width: int
    path_kl: float | None
    evaluations: float | None
    sha256: str
    cards: str | None
    base_model: str | None
    trust_region: float | None
    branch: str | None
    lam_schedule: list | None  # type: ignore[type-arg]
    generator_seed: int | None
    timesteps_sha256: str | None
    seconds: float | None
    ess: float | None


def _accepted_types() -> dict[str, tuple[type, ...]]:
    """The types that a line's value may have, by key. An integer is a number, too."""
    hints = get_type_hints(ImageRecord)
    accepted: dict[str, tuple[type, ...]] = dict.fromkeys(SETTINGS, (int, float, type(None)))
    for field in fields(ImageRecord):
        types = get_args(hints[field.name]) or (hints[field.name],)
        accepted[field.name] = (int, *types) if float in types else types
    return accepted


ACCEPTED_TYPES = _accepted_types()


def read_manifest(run: str) -> list[dict[str, Any]]:
    """The lines of `<run>/manifest.jsonl`, each with its `run`, and with its mode's full name.

    An image that is listed twice counts as it was listed last.

    Raises:
        ValueError: where the run, its manifest or a line is not what it should be.
    """
    if not Path(run).is_dir():
        raise ValueError(
            f"there is no sample run {run}; type samples=[runs/sample/<name>] with a folder that "
            f"{command_of('sample')} wrote"
        )
    manifest = Path(run) / MANIFEST
    if not manifest.is_file():
        raise ValueError(
            f"{run} has no {MANIFEST}; run the sample stage to its end, or give another folder in "
            "samples=[...]"
        )
    newest: dict[str, dict[str, Any]] = {}
    # Not splitlines: a prompt may hold U+2028
    lines = read_text(manifest).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_line(line)
        except ValueError as error:
            raise ValueError(
                f"{manifest} line {number} {error}; run the sample stage's command again, it makes "
                "that image anew"
            ) from error
        newest[record["image"]] = record | {"run": run, "mode": full_name(record)}
    if not newest:
        raise ValueError(f"{manifest} is empty; run the sample stage's command again")
    return list(newest.values())


def parse_line(line: str) -> dict[str, Any]:
    """One line of a manifest, with the keys of `ImageRecord`, in the order of the line.

    Args:
        line: the line.

    Raises:
        ValueError: for what no run has written; the message goes on a sentence about the line.
    """
    # A record, as it was written.
    try:
        content = parse_json(line, "it")
    except ValueError as error:
        raise ValueError(f"is not JSON ({short_reason(error)})") from None
    try:
        record = unsealed(content)
    except ValueError as error:
        raise ValueError(f"cannot be used ({error})") from None

    # Its keys, and no others.
    for key, meaning in OPTIONAL.items():
        record.setdefault(key, meaning)
    for key, types in ACCEPTED_TYPES.items():
        if key not in record:
            raise ValueError(f"lacks {key!r}")
        value = record[key]
        if not isinstance(value, types) or isinstance(value, bool):
            names = " or ".join(one.__name__ for one in types)
            raise ValueError(f"has {key}={reprlib.repr(value)}, which is no {names}")
        if not _is_usable(key, value):
            raise ValueError(f"has {key}={reprlib.repr(value)}, which no image has")
    return {key: value for key, value in record.items() if key in ACCEPTED_TYPES}


def _is_usable(key: str, value: Any) -> bool:
    """Whether a value of the right type can be computed with, printed and drawn."""
    if key == "prompt":
        return is_encodable(value)
    if isinstance(value, str):
        return bool(value) and value.isprintable()
    if isinstance(value, dict):
        are_lines = all(isinstance(name, str) and name.isprintable() for name in value)
        return are_lines and all(_is_number(share) for share in value.values())
    if isinstance(value, list):
        # Factors, or [fraction of time, factor].
        numbers = []
        for row in value:
            numbers += row if isinstance(row, list) else [row]
        return all(map(_is_number, numbers))
    if value is None or (key == "path_kl" and value != value):
        return True
    if key in POSITIVE and value < 1:
        return False
    if key == "beta" and not value > 0:
        return False
    return _is_number(value)


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a table of numbers holds."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


def read_samples(runs: Sequence[str], references: Sequence[str] = ()) -> pd.DataFrame:
    """The manifests of sample runs as one table, a row an image.

    Args:
        runs: run directories whose realigned models are evaluated.
        references: run directories that serve as targets and as the reference, and as nothing else.

    Returns:
        The manifest's keys, `run`, `file` (the image's path), `is_own` (it is the reference's or an
        anchor's own image), and `realigned`: False for images of `references`.

    Raises:
        ValueError: where a run, a line or an image is not what it should be. Missing and altered
            images are counted and named.
    """
    rows = []
    for run in [*runs, *references]:
        for record in read_manifest(run):
            own = {"realigned": run in runs, "is_own": is_one_network(record)}
            # A column of lists of several forms is no column of a table.
            schedule = record["lam_schedule"]
            record["lam_schedule"] = json.dumps(schedule) if schedule else None
            rows.append(record | own)
    table = pd.DataFrame(rows)
    table = table[table["realigned"] | table["is_own"]].reset_index(drop=True)
    table["file"] = [str(Path(run) / image) for run, image in zip(table["run"], table["image"])]
    _check_images(table)
    _check_pairing(table)
    return table


def _check_images(table: pd.DataFrame) -> None:
    """Raises ValueError for images that are elsewhere, missing, or not what was sampled."""
    for image in table["image"]:
        if Path(image).is_absolute() or ".." in Path(image).parts:
            raise ValueError(
                f"the image path {image!r} leads out of its run directory; sample that run again"
            )
    missing = [file for file in table["file"] if not Path(file).is_file()]
    if missing:
        raise ValueError(
            f"{_named(missing)} missing; run the sample stage's command again, it makes what is "
            "not there"
        )
    altered = []
    for file, sha256 in zip(table["file"], table["sha256"]):
        if hashlib.sha256(Path(file).read_bytes()).hexdigest() != sha256:
            altered.append(file)
    if altered:
        raise ValueError(
            f"{_named(altered)} not what the manifest's sha256 says; delete them and run the "
            "sample stage's command again"
        )


def _named(files: list[str]) -> str:
    """How many images, and the first of them."""
    first = ", ".join(files[:3])
    more = ", ..." if len(files) > 3 else ""
    verb = "s are" if len(files) > 1 else " is"
    return f"{len(files)} image{verb} ({first}{more})"


def _check_pairing(table: pd.DataFrame) -> None:
    """Raises ValueError where images that would be compared do not belong together.

    A prompt_id is one prompt, and what is compared started from one noise and took the same steps.
    """
    same_within = {
        "prompt": ["prompt_id"],
        "generator_seed": ["prompt_id", "seed", "height", "width"],
        "timesteps_sha256": SAMPLING_COLUMNS,
    }
    for column, keys in same_within.items():
        counts = table.groupby(keys)[column].nunique()
        if counts.gt(1).any():
            values = np.atleast_1d(np.array(counts.idxmax(), dtype=object))
            where = ", ".join(f"{key}={value}" for key, value in zip(keys, values))
            raise ValueError(
                f"the samples given do not belong together: {column} differs at {where}; evaluate "
                "those runs apart"
            )


def read_cards(table: pd.DataFrame) -> dict[str, AnchorCard]:
    """The cards of the anchors that are local folders with a card, by the anchor's name.

    Those of a mixture's anchors are among them.

    Raises:
        ValueError: where a card says something else than when images were sampled.
    """
    anchors = dict.fromkeys(table["anchor"])
    for shares in table["shares"].dropna():
        anchors |= dict.fromkeys(shares)
    cards = {}
    for anchor in anchors:
        card = read_card(anchor) if Path(anchor).is_dir() else None
        if card is not None:
            cards[anchor] = card
    _check_cards(table, cards)
    return cards


def _check_cards(table: pd.DataFrame, cards: Mapping[str, AnchorCard]) -> None:
    """Raise ValueError where images were sampled under other cards than there are now."""
    sampled = table[table["cards"].notna()]
    for row in sampled.drop_duplicates(["run", "anchor", "cards"]).to_dict("records"):
        anchors = row["shares"] or [row["anchor"]]
        own_cards = [cards.get(anchor) for anchor in anchors]
        is_known = all(card is not None for card in own_cards)
        if is_known and cards_digest(own_cards) != row["cards"]:
            raise ValueError(
                f"the card of {' or '.join(anchors)} is another than when {row['run']} was "
                "sampled: restore it, or sample that run again under another name"
            )
