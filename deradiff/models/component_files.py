"""Which files of a pipeline's folder belong to a component, and what is missing.

Known by the names of the files alone, so it is the same for a folder and for the hub's listing.

The weights of a network lie in one file (`diffusion_pytorch_model.safetensors`, `model.safetensors`
for transformers) or in several with an index (`...-00001-of-00002.safetensors`). A variant such as
`fp16` stands before the number or the ending: `diffusion_pytorch_model.fp16.safetensors`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
TRANSFORMERS_WEIGHTS = "model"
TRANSFORMERS_PICKLE = "pytorch_model"

STEMS = {
    "diffusers": (DIFFUSERS_WEIGHTS,),
    "transformers": (TRANSFORMERS_WEIGHTS, TRANSFORMERS_PICKLE),
}
"""How the names of weights begin, by the library that reads them; it reads no other names."""

FORMATS = ("safetensors", "bin")
"""Endings of files of weights; where there are both, the first is read."""

WEIGHTS_NAME = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
    r"(\.(?P<variant>[^.]+?))?"
    r"(-(?P<number>\d{5})-of-(?P<count>\d{5}))?"
    r"(\.(?P<old_variant>[^.-]+))?"
    r"\.(?P<format>safetensors|bin)"
)
"""A file of weights; old sharded variants have their name after the number."""

HALF_VARIANTS = ("fp16", "bf16")
"""Variants that are preferred to others (`non_ema`, float8), in this order."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
)
"""Files of which a tokenizer has one at least."""

CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"


@dataclass(frozen=True)
class WeightSet:
    """One copy of a network's weights: a file, or shards with an index.

    Attributes:
        variant: such as `fp16`; None: the plain files.
        format: `safetensors` or `bin`.
        files: that are there, in order; paths in the pipeline's folder.
        missing: a shard or the index that is not there; None: the copy is complete.
    """

    variant: str | None
    format: str
    files: tuple[str, ...]
    missing: str | None = None


@dataclass(frozen=True)
class Component:
    """A component of a pipeline, as `model_index.json` names it.

    Attributes:
        folder: its name, which is also its folder; "" for a network that lies at the root.
        library: that reads it, `diffusers` or `transformers`.
        class_name: of the library.
    """

    folder: str
    library: str
    class_name: str

    @property
    def is_scheduler(self) -> bool:
        """Whether this is a scheduler."""
        return self.class_name.endswith("Scheduler")

    @property
    def is_tokenizer(self) -> bool:
        """Whether this is a tokenizer; its class may have any name."""
        return self.folder.startswith("tokenizer")

    @property
    def is_network(self) -> bool:
        """Whether this has weights."""
        is_processor = "Processor" in self.class_name or "FeatureExtractor" in self.class_name
        return not (self.is_scheduler or self.is_tokenizer or is_processor)

    def path(self, name: str) -> str:
        """The path of a file of this component in the pipeline's folder."""
        return f"{self.folder}/{name}" if self.folder else name

    def weights(self, names: Collection[str]) -> WeightSet | None:
        """The copy of the weights that is read; None: there is none.

        A complete copy comes before one that lacks a file, plain files come before a variant, and
        safetensors before pickles.

        Args:
            names: paths of all files in the pipeline's folder.
        """
        sets = self._weight_sets(names)
        return min(sets, key=_rank) if sets else None

    def missing(self, names: Collection[str]) -> str | None:
        """The path of a file that is needed and not there; None: all are there.

        Args:
            names: paths of all files in the pipeline's folder.
        """
        if self.is_network:
            return self._missing_of_network(names)
        if self.is_scheduler:
            config = self.path(SCHEDULER)
            return None if config in names else config
        own = [name for name in names if name.startswith(f"{self.folder}/")]
        if self.is_tokenizer:
            found = [name for name in TOKENIZER_FILES if self.path(name) in own]
            return None if found else self.path(TOKENIZER_FILES[0])
        return None if own else self.path("preprocessor_config.json")

    def _missing_of_network(self, names: Collection[str]) -> str | None:
        config = self.path(CONFIG)
        if config not in names:
            return config
        weights = self.weights(names)
        if weights is None:
            stem = STEMS.get(self.library, (DIFFUSERS_WEIGHTS,))[0]
            return self.path(f"{stem}.safetensors")
        return weights.missing

    def _weight_sets(self, names: Collection[str]) -> list[WeightSet]:
        """The copies of the weights, whether complete or not."""
        # Files of one copy have stem, variant and format in common.
        copies: dict[tuple[str, str | None, str], list[re.Match[str]]] = {}
        for name in sorted(names):
            folder, _, file = name.rpartition("/")
            match = WEIGHTS_NAME.fullmatch(file)
            if match is None or folder != self.folder:
                continue
            if match["stem"] in STEMS.get(self.library, (match["stem"],)):
                variant = match["variant"] or match["old_variant"]
                copies.setdefault((match["stem"], variant, match["format"]), []).append(match)

        # Beside one file, shards of the same copy are not read.
        sets = []
        for (stem, variant, ending), matches in copies.items():
            whole = [match for match in matches if match["number"] is None]
            files = tuple(self.path(match[0]) for match in whole or matches)
            missing = None if whole else self._missing_shard(matches, names)
            if missing is None and not whole:
                index = self._index_name(stem, variant, ending)
                is_old = any(match["old_variant"] for match in matches)
                missing = None if index in names or is_old else index
            sets.append(WeightSet(variant, ending, files, missing))
        return sets

    def _missing_shard(
        self, matches: Sequence[re.Match[str]], names: Collection[str]
    ) -> str | None:
        """The first shard that is not there; None: all are."""
        first = matches[0]
        for number in range(1, int(first["count"]) + 1):
            file = first[0].replace(f"-{first['number']}-of-", f"-{number:05d}-of-")
            if self.path(file) not in names:
                return self.path(file)
        return None

    def _index_name(self, stem: str, variant: str | None, ending: str) -> str:
        """The path of the index of shards."""
        middle = f".{variant}" if variant else ""
        return self.path(f"{stem}.{ending}.index{middle}.json")


def components_of(index: dict[str, Any]) -> list[Component]:
    """The components that a `model_index.json` names.

    Args:
        index: its content; a component that is null there is none.
    """
    components = []
    for name, value in index.items():
        is_component = isinstance(value, list) and len(value) == 2
        if is_component and all(isinstance(part, str) for part in value):
            components.append(Component(name, *value))
    return components


def _rank(weights: WeightSet) -> tuple[bool, int, int]:
    """The place of a copy in the order of preference."""
    if weights.variant is None:
        place = 0
    elif weights.variant in HALF_VARIANTS:
        place = 1 + HALF_VARIANTS.index(weights.variant)
    else:
        place = 1 + len(HALF_VARIANTS)
    return weights.missing is not None, place, FORMATS.index(weights.format)
