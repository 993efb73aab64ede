"""What images are like, whatever their prompt: diversity, edges, saturation, colour entropy.

Reward hacking changes these first. None of them is a score: more of it is not better, so lambda is
not chosen by them, and they raise no alarm.

Each number is computed once, as each score is, and the processes of a command share the work.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from deradiff.evaluation.pairing import MODEL_COLUMNS
from deradiff.evaluation.shared_work import BatchedWork, process_state
from deradiff.evaluation.statistics import Array
from deradiff.image_files import read_image
from deradiff.progress import progress_bar
from deradiff.scorers import entry_of, load_spec
from deradiff.scorers.base import EmbeddingScorer, Statement, digest
from deradiff.scorers.cache import ScoreCache, ScoreKey, score_key
from deradiff.scorers.spec import ScorerSpec

LARGEST = 256
"""Pixels of the longer side of an image that is measured. Larger ones are averaged down to it, so
that edges of images of different sizes are in one unit."""

LEVELS = 8
"""Into so many levels each channel is cut for the histogram of colours."""

LUMA = (0.299, 0.587, 0.114)
"""Red, green and blue in the luminance of a pixel (ITU-R BT.601)."""

DIVERSITY = "diversity"

IMAGES_AT_ONCE = 16
"""Images that are read at once to be measured."""


def edges(pixels: Array) -> float:
    """The mean steepness of the luminance: its change from a pixel to the next, by Sobel's filter.

    Args:
        pixels: (H, W, 3), in [0, 1].
    """
    luminance = pixels @ np.array(LUMA)
    down = ndimage.sobel(luminance, axis=0, mode="nearest") / 8
    across = ndimage.sobel(luminance, axis=1, mode="nearest") / 8
    return float(np.hypot(down, across).mean())


def saturation(pixels: Array) -> float:
    """The mean saturation of HSV, 0 for grey to 1 for pure colours.

    Args:
        pixels: (H, W, 3), in [0, 1].
    """
    largest = pixels.max(axis=-1)
    chroma = largest - pixels.min(axis=-1)
    return float(np.divide(chroma, largest, out=np.zeros_like(chroma), where=largest > 0).mean())


def colour_entropy(pixels: Array) -> float:
    """The entropy of the histogram of colours in bits: 0 for one colour, at most 9.

    Args:
        pixels: (H, W, 3), in [0, 1].
    """
    level = np.minimum((pixels * LEVELS).astype(int), LEVELS - 1)
    colour = (level[..., 0] * LEVELS + level[..., 1]) * LEVELS + level[..., 2]
    counts = np.bincount(colour.ravel())
    shares = counts[counts > 0] / colour.size
    return float(-(shares * np.log2(shares)).sum())


@dataclass(frozen=True)
class Property:
    """A property of one image.

    Attributes:
        measure: its number, from the pixels (H, W, 3) in [0, 1].
        unit: of that number.
    """

    measure: Callable[[Array], float]
    unit: str


PROPERTIES = {
    "edges": Property(edges, "change of luminance a pixel"),
    "saturation": Property(saturation, "0 to 1"),
    "colour entropy": Property(colour_entropy, "bits"),
}
"""The properties of an image, by name. Diversity is one of several images."""


@dataclass(frozen=True)
class ImageProperties:
    """The measured properties of samples.

    Attributes:
        values: a row per property and image, and of diversity per pair of images: the columns of a
            model, `prompt_id`, `seed` (of a pair both), `property`, `value`.
        units: of the properties that were measured, by name.
        missing: a sentence that says why there is no diversity; empty: there is.
    """

    values: pd.DataFrame
    units: Mapping[str, str]
    missing: str


def measure_images(
    samples: pd.DataFrame,
    scorers: Mapping[str, ScorerSpec],
    chosen: str,
    batch_size: int,
    cache: Path,
) -> ImageProperties | None:
    """Measure the properties of every image, and the diversity of every prompt's images.

    Diversity is the mean cosine distance between the images of a prompt, over pairs of seeds, in
    the image embedding of a scorer. It is the first scorer that has one and that lambda is not
    chosen by; where there is no other, the one that it is chosen by.

    Args:
        samples: a row an image (`read_samples`).
        scorers: by label.
        chosen: the label of the scorer that lambda is chosen by.
        batch_size: images that a network embeds at once.
        cache: the folder of the scores of all runs.

    Returns:
        The properties. Processes other than the main one get None.
    """
    samples = samples.drop_duplicates([*MODEL_COLUMNS, "prompt_id", "seed"])
    tables = [_measure_each(samples, cache)]
    units = {name: one.unit for name, one in PROPERTIES.items()}

    # Diversity, where it can be measured
    embedder = _embedder(scorers, chosen)
    pairs = _pairs(samples)
    missing = ""
    if embedder is None:
        missing = "diversity is not measured, for none of the scorers has an image embedding"
    elif pairs.empty:
        missing = "diversity is not measured, for each prompt was sampled with one seed"
    else:
        distances = _distances(samples, pairs, scorers[embedder], batch_size, cache)
        tables = [distances, *tables]
        units = {DIVERSITY: f"cosine distance by {embedder}", **units}

    if not process_state().is_main_process:
        return None
    return ImageProperties(pd.concat(tables, ignore_index=True), units, missing)


def _embedder(scorers: Mapping[str, ScorerSpec], chosen: str) -> str | None:
    """The label of the scorer in whose embedding diversity is measured."""
    able = [label for label, spec in scorers.items() if entry_of(spec).embeds_images]
    able.sort(key=lambda label: label == chosen)
    return able[0] if able else None


def _measure_each(samples: pd.DataFrame, cache: Path) -> pd.DataFrame:
    """The properties of each image."""
    things = samples.assign(keys=[_keys_of(sha256) for sha256 in samples["sha256"]])
    is_main = process_state().is_main_process
    with progress_bar(len(things), "properties", "image", is_shown=is_main) as progress:
        store = ScoreCache(cache, _statement())
        numbers = _Measuring(store, IMAGES_AT_ONCE, progress).complete(things)
    tables = []
    for place, name in enumerate(PROPERTIES):
        values = [numbers.get(keys[place], np.nan) for keys in things["keys"]]
        tables.append(_table(samples, name, values))
    return pd.concat(tables)


def _keys_of(sha256: str) -> tuple[ScoreKey, ...]:
    """The keys of an image's properties: a property's name stands in the place of a prompt."""
    return tuple(score_key(sha256, name) for name in PROPERTIES)


def _table(rows: pd.DataFrame, name: str, values: list[float]) -> pd.DataFrame:
    """The values of one property."""
    return rows[[*MODEL_COLUMNS, "prompt_id", "seed"]].assign(property=name, value=values)


@functools.cache
def _own_digest() -> str:
    return digest([Path(__file__)])


def _statement() -> Statement:
    """What the cache knows of the properties of an image."""
    preparation = f"RGB, averaged down to {LARGEST} pixels"
    return Statement("properties", _own_digest(), "of each property its own", preparation)


class _Measuring(BatchedWork):
    """The properties of each image."""

    def compute(self, batch: pd.DataFrame) -> dict[ScoreKey, float]:
        """All properties of some images."""
        numbers = {}
        for file, keys in zip(batch["file"], batch["keys"]):
            pixels = _pixels(file)
            for key, one in zip(keys, PROPERTIES.values()):
                numbers[key] = one.measure(pixels)
        return numbers


def _pixels(file: str) -> Array:
    """An image as it is measured: (H, W, 3), in [0, 1]."""
    image = read_image(file).convert("RGB")
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float64) / 255


def _pairs(samples: pd.DataFrame) -> pd.DataFrame:
    """Every pair of images of a model and prompt.

    Returns:
        The columns of a model, `prompt_id`, `seed` (both seeds as a text), `key`.
    """
    rows = []
    for group, images in samples.sort_values("seed").groupby([*MODEL_COLUMNS, "prompt_id"]):
        ordered = list(zip(images["seed"], images["sha256"]))
        for (seed, sha256), (other_seed, other_sha256) in itertools.combinations(ordered, 2):
            key = _pair_key(sha256, other_sha256)
            rows.append((*group, f"{seed}, {other_seed}", key))
    return pd.DataFrame(rows, columns=[*MODEL_COLUMNS, "prompt_id", "seed", "key"])


def _pair_key(sha256: str, other: str) -> ScoreKey:
    """The key of a distance, which is the same both ways."""
    first, second = sorted((sha256, other))
    return first, second


def _distances(
    samples: pd.DataFrame, pairs: pd.DataFrame, spec: ScorerSpec, batch_size: int, cache: Path
) -> pd.DataFrame:
    """The distance of each pair."""
    # A thing is the images of a prompt, each of which is embedded once
    things = []
    for _, images in samples.groupby([*MODEL_COLUMNS, "prompt_id"]):
        if len(images) > 1:
            ordered = images.sort_values("sha256")
            sha256s = list(ordered["sha256"])
            keys = [_pair_key(*both) for both in itertools.combinations(sha256s, 2)]
            things.append({"files": list(ordered["file"]), "keys": tuple(keys)})
    most_images = max(len(thing["files"]) for thing in things)

    state = process_state()
    with progress_bar(len(things), DIVERSITY, "prompt", is_shown=state.is_main_process) as progress:
        scorer: Any = load_spec(spec, device=str(state.device))
        store = ScoreCache(cache, _statement_of_distances(scorer))
        work = _Embedding(scorer, store, max(1, batch_size // most_images), progress)
        numbers = work.complete(pd.DataFrame(things))
    values = [numbers.get(key, np.nan) for key in pairs["key"]]
    return _table(pairs, DIVERSITY, values)


def _statement_of_distances(scorer: EmbeddingScorer) -> Statement:
    """What the cache knows of distances in a scorer's image embedding."""
    version = hashlib.sha256(f"{scorer.version} {_own_digest()}".encode()).hexdigest()[:12]
    name = f"{DIVERSITY} by {scorer.name}"
    return Statement(name, version, "cosine distance", scorer.preprocessing)


class _Embedding(BatchedWork):
    """The distances between the images of each prompt.

    Args:
        scorer: whose embedding it is.
        cache: of the distances.
        batch_size: prompts at once.
        progress: over prompts.
    """

    def __init__(
        self, scorer: EmbeddingScorer, cache: ScoreCache, batch_size: int, progress: tqdm
    ) -> None:
        super().__init__(cache, batch_size, progress)
        self.scorer = scorer

    def compute(self, batch: pd.DataFrame) -> dict[ScoreKey, float]:
        """The distances between the images of some prompts."""
        files = list(itertools.chain.from_iterable(batch["files"]))
        vectors = self.scorer.embed([read_image(file) for file in files]).double().numpy()
        numbers = {}
        start = 0
        for own_files, keys in zip(batch["files"], batch["keys"]):
            own = vectors[start : start + len(own_files)]
            start += len(own_files)
            for key, (one, other) in zip(keys, itertools.combinations(own, 2)):
                numbers[key] = float(1 - one @ other)
        return numbers
