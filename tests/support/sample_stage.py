"""Runs of the sample stage on tiny pipelines: their anchors, manifests and images."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deradiff.anchors.anchor import AnchorCard, save_anchor
from deradiff.data.prompts import Prompt, prompt_id
from deradiff.models.families import FAMILIES
from sample.sampling import PromptSeed
from tests.support.tiny_pipelines import (
    VISIBLE,
    perturbed_denoiser,
    save_tiny,
    tiny_lora,
    tiny_pipeline,
)

BETA = 2000.0


def save_anchors(folder: Path, families: Iterable[str], scale: float) -> Path:
    """Write `<family>-base`, `<family>-full/anchor` and `<family>-lora/anchor` of each family.

    Args:
        folder: where.
        families: by name.
        scale: how far the weights of full anchors are from their base.

    Returns:
        The folder.
    """
    for family in families:
        base = save_tiny(family, folder / f"{family}-base")
        denoiser = getattr(tiny_pipeline(family), FAMILIES[family].denoiser)
        anchors = {
            "full": perturbed_denoiser(denoiser, scale),
            "lora": tiny_lora(denoiser, scale=VISIBLE),
        }
        for method, anchor in anchors.items():
            card = AnchorCard(base_model=str(base), family=family, method=method, beta=BETA)
            save_anchor(folder / f"{family}-{method}/anchor", anchor, card)
    return folder


def prompt_seed(text: str, seed: int) -> PromptSeed:
    """What the stage samples of a prompt that comes once."""
    return PromptSeed(Prompt(prompt_id(text), text), seed)


def read_manifest(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (run_dir / "manifest.jsonl").read_text().splitlines()]


def read_images(run_dir: Path) -> dict[str, np.ndarray]:
    """The images of a run, as integers, by their path in it."""
    images = {}
    for record in read_manifest(run_dir):
        name = record["image"]
        images[name] = np.asarray(Image.open(run_dir / name)).astype(int)
    return images


def difference(
    one: dict[str, np.ndarray], other: dict[str, np.ndarray], lam: float | None = None
) -> int:
    """The largest difference between the images of two runs.

    Args:
        one: images of a run.
        other: the same images of another run.
        lam: compare the images at this lambda only; None: all, and no run may have more.
    """
    if lam is None:
        assert one.keys() == other.keys()
        names = list(one)
    else:
        names = [name for name in one if name.startswith(f"lam={lam:.2f}")]
    return max(abs(one[name] - other[name]).max() for name in names)
