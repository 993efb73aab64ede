"""What the sample stage left: manifests read and checked, images that are still the ones that were sampled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deradiff.anchors.anchor import AnchorCard, read_card
from deradiff.realignment.registry import full_name

# The contract of manifest.jsonl: each key with the types it may have. More keys are welcome.
NUMBER, NONE = (int, float), type(None)
MANIFEST: dict[str, tuple[type, ...]] = {
    "image": (str,),
    "sha256": (str,),
    "prompt_id": (str,),
    "prompt": (str,),
    "seed": (int,),
    "anchor": (str,),
    "beta": (*NUMBER, NONE),
    "lam": NUMBER,
    "beta_target": (*NUMBER, NONE),
    "mode": (str,),
    "sampler": (str,),
    "eta": NUMBER,
    "steps": (int,),
    "guidance_scale": NUMBER,
    "height": (int,),
    "width": (int,),
    "path_kl": (*NUMBER, NONE),
}
BENCH = [
    "sampler",
    "eta",
    "steps",
    "guidance_scale",
    "height",
    "width",
]  # images that differ in any of these are never compared


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not JSON ({error.msg}); run the sample stage's command again to complete it"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object; sample that run again")
    row.setdefault("eta", 0.0)  # of DDIM alone
    row.setdefault("evaluations", None)  # counted by newer versions
    for key, types in MANIFEST.items():
        if key not in row:
            raise ValueError(f"{where} lacks {key!r}; sample that run again with this version")
        if not isinstance(row[key], types) or isinstance(row[key], bool):
            raise ValueError(
                f"{where} has {key}={row[key]!r}, which is no {' or '.join(t.__name__ for t in types)}; sample that run again"
            )
    return row | {"mode": full_name(row)}


def read_manifest(run: str) -> list[dict[str, Any]]:
    """The rows of `<run>/manifest.jsonl`, each with its `run`; an image listed twice counts as it was listed last. Raises ValueError."""
    if not Path(run).is_dir():
        raise ValueError(
            f"there is no sample run {run}; type samples=[runs/sample/<name>] with a folder that python -m sample wrote"
        )
    manifest = Path(run) / "manifest.jsonl"
    if not manifest.is_file():
        raise ValueError(
            f"{run} has no manifest.jsonl; run the sample stage to its end, or give another folder in samples=[...]"
        )
    lines = enumerate(
        manifest.read_text(encoding="utf-8").split("\n"), start=1
    )  # not splitlines: a prompt may hold U+2028
    rows = [_row(line, f"{manifest} line {number}") for number, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{manifest} is empty; run the sample stage's command again")
    return list({row["image"]: row | {"run": run} for row in rows}.values())


def read_samples(runs: list[str], references: Sequence[str] = ()) -> pd.DataFrame:
    """The manifests of all runs, a row an image: the contract's columns, `run`, `file`, the image's path, and `realigned`, False for
    images of `references`, which serve as targets alone.

    Raises ValueError where a run, a line or an image is not what it should be; missing and altered images are counted and named.
    """
    table = pd.DataFrame(
        [
            row | {"realigned": run in runs}
            for run in [*runs, *references]
            for row in read_manifest(run)
        ]
    )
    table = table[table["realigned"] | table["lam"].isin([0, 1])].reset_index(drop=True)
    table["file"] = [str(Path(run) / image) for run, image in zip(table["run"], table["image"])]
    escaped = [
        image for image in table["image"] if Path(image).is_absolute() or ".." in Path(image).parts
    ]
    if escaped:
        raise ValueError(
            f"the image path {escaped[0]!r} leads out of its run directory; sample that run again"
        )
    missing = [f for f in table["file"] if not Path(f).is_file()]
    if missing:
        raise ValueError(
            f"{_named(missing)} missing; run the sample stage's command again, it makes what is not there"
        )
    altered = [
        f
        for f, digest in zip(table["file"], table["sha256"])
        if hashlib.sha256(Path(f).read_bytes()).hexdigest() != digest
    ]
    if altered:
        raise ValueError(
            f"{_named(altered)} not what the manifest's sha256 says; delete them and run the sample stage's command again"
        )
    _check_pairing(table)
    return table


def _named(files: list[str]) -> str:
    shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    return f"{len(files)} image{'s are' if len(files) > 1 else ' is'} ({shown})"


def _check_pairing(table: pd.DataFrame) -> None:
    """One prompt_id is one prompt, and what is compared started from one noise and took the same steps. Raises ValueError."""
    one = {
        "prompt": ["prompt_id"],
        "generator_seed": ["prompt_id", "seed", "height", "width"],
        "timesteps_sha256": BENCH,
    }
    for column, within in one.items():
        if column in table and (counts := table.groupby(within)[column].nunique()).gt(1).any():
            where = ", ".join(
                f"{key}={value}"
                for key, value in zip(
                    within, np.atleast_1d(np.array(counts.idxmax(), dtype=object))
                )
            )
            raise ValueError(
                f"the samples given do not belong together: {column} differs at {where}; evaluate those runs apart"
            )


def read_cards(table: pd.DataFrame) -> dict[str, AnchorCard]:
    """The cards of those anchors that are local folders with a card, by the manifest's `anchor`."""
    cards = {
        anchor: read_card(anchor) for anchor in table["anchor"].unique() if Path(anchor).is_dir()
    }
    return {anchor: card for anchor, card in cards.items() if card is not None}
