"""A base model: where it lies, which family it is of, and its parts, loaded one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch

from deradiff.files import locate
from deradiff.hub import fetch
from deradiff.models.families import (
    Family,
    check_autoencoder,
    checkpoint_family,
    load_pipeline,
    model_index,
)

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class BaseModel:
    """A pipeline folder, hub id or `asset:` name, with the autoencoder that is used with it.

    Made once from a config and passed on. Nothing is read until it is asked for, and the index is
    read once.

    Args:
        source: a pipeline folder, a hub id (`org/name`) or `asset:<name>`.
        revision: a branch, tag or commit of the hub; None: the default branch.
        vae: the source of an autoencoder that replaces the base model's own; None: its own.
    """

    source: str
    revision: str | None = None
    vae: str | None = None

    @cached_property
    def location(self) -> str:
        """The folder or hub id: `asset:` names are resolved. Raises ValueError for an unknown one."""
        return locate(self.source)

    @cached_property
    def index(self) -> dict[str, Any]:
        """`model_index.json`. Raises ValueError where it cannot be read."""
        return model_index(self.source, self.revision)

    @cached_property
    def family(self) -> Family:
        """The family that the index names. Raises ValueError for a pipeline of no known family."""
        return checkpoint_family(self.source, self.revision)

    def check(self) -> None:
        """Raises ValueError where the index or the autoencoder's folder is missing.

        No weight is read.
        """
        if self.vae:
            check_autoencoder(self.vae)
        assert self.family

    def read_json(self, name: str) -> dict[str, Any]:
        """A small JSON file of the base model, such as `scheduler/scheduler_config.json`.

        Raises:
            ValueError: where the file cannot be read.
        """
        try:
            if Path(self.location).is_dir():
                file = Path(self.location) / name
            else:
                file = fetch(self.location, name, self.revision)
            return json.loads(file.read_text())
        except OSError as error:
            raise ValueError(f"{name} of {self.location} could not be read ({error})") from error

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        """The denoiser's config; no weight is read."""
        kind = getattr(diffusers, self.family.denoiser_class)
        return dict(
            kind.load_config(self.location, subfolder=self.family.denoiser, revision=self.revision)
        )

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The autoencoder's config; no weight is read."""
        return dict(diffusers.AutoencoderKL.load_config(**self._vae_source()))

    def _vae_source(self) -> dict[str, Any]:
        if self.vae:
            return {"pretrained_model_name_or_path": locate(self.vae)}
        return {
            "pretrained_model_name_or_path": self.location,
            "subfolder": "vae",
            "revision": self.revision,
        }

    def load_vae(self, dtype: torch.dtype) -> Any:
        """The autoencoder that is used with this base model."""
        return diffusers.AutoencoderKL.from_pretrained(**self._vae_source(), dtype=dtype)

    def load_denoiser(self, dtype: torch.dtype) -> Any:
        """The denoiser alone."""
        kind = getattr(diffusers, self.family.denoiser_class)
        return kind.from_pretrained(
            self.location,
            subfolder=self.family.denoiser,
            revision=self.revision,
            dtype=dtype,
        )

    def load_pipeline(
        self, dtype: torch.dtype = torch.float32, parts: Mapping[str, Any] | None = None
    ) -> Any:
        """The text-to-image pipeline, with the autoencoder that is used with it.

        Args:
            dtype: precision of the weights.
            parts: components that replace the pipeline's own, which are then not loaded; None as a
                component leaves it out.
        """
        replaced = dict(parts or {})
        if self.vae and "vae" not in replaced:
            replaced["vae"] = self.load_vae(dtype)
        return load_pipeline(self.source, self.revision, dtype, **replaced)
