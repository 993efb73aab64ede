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
from deradiff.hub import fetch, is_hub_id
from deradiff.models.families import Family, family_of_index

INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class BaseModel:
    """A pipeline folder, hub id or `asset:` name, and the autoencoder that is used with it.

    Made once from a config and passed on. Nothing is read before it is asked for, and the index is
    read once.

    Attributes:
        source: a pipeline folder, a hub id (`org/name`) or `asset:<name>`.
        revision: a branch, tag or commit of the hub; None: the default branch.
        vae: the source of an autoencoder that replaces the base model's own; None: its own.
    """

    source: str
    revision: str | None = None
    vae: str | None = None

    @cached_property
    def location(self) -> str:
        """The folder or hub id; the folder of an `asset:` name.

        Raises:
            ValueError: for an asset that does not ship with deradiff.
        """
        return locate(self.source)

    @cached_property
    def index_file(self) -> Path:
        """`model_index.json`, in the folder or in the hub's cache.

        Raises:
            ValueError: where there is none.
        """
        if Path(self.location).is_dir():
            file = Path(self.location) / INDEX
            if not file.is_file():
                raise ValueError(f"{self.location} is not a diffusers pipeline: it has no {INDEX}")
            return file
        if not is_hub_id(self.location):
            raise ValueError(
                f"there is no pipeline folder {self.location}; give a folder with a {INDEX} or a "
                "hub id such as org/name"
            )
        try:
            return fetch(self.location, INDEX, self.revision)
        except OSError as error:
            raise ValueError(
                f"the pipeline {self.location} is no local folder and could not be read from the "
                f"hub ({error})"
            ) from error

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of `model_index.json`.

        Raises:
            ValueError: where there is none.
        """
        return json.loads(self.index_file.read_text())

    @cached_property
    def family(self) -> Family:
        """The family that the index names.

        Raises:
            ValueError: where there is no index, or for a pipeline of no known family.
        """
        return family_of_index(self.index, self.location)

    def check(self) -> None:
        """Find the index and the autoencoder; no weight is read.

        Raises:
            ValueError: where one of them cannot be found, or for a pipeline of no known family.
        """
        if self.vae:
            check_autoencoder(self.vae)
        assert self.family

    def read_json(self, name: str) -> dict[str, Any]:
        """A small JSON file of the base model.

        Args:
            name: its path in the folder, such as `scheduler/scheduler_config.json`.

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

    @property
    def denoiser_type(self) -> Any:
        """diffusers' class of the denoiser."""
        return getattr(diffusers, self.family.denoiser_class)

    @property
    def autoencoder_type(self) -> Any:
        """diffusers' class of the autoencoder."""
        return getattr(diffusers, self.family.autoencoder_class)

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        """The denoiser's config; no weight is read."""
        config = self.denoiser_type.load_config(
            self.location, subfolder=self.family.denoiser, revision=self.revision
        )
        return dict(config)

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The autoencoder's config; no weight is read."""
        source, where = self._vae_source
        return dict(self.autoencoder_type.load_config(source, **where))

    @property
    def _vae_source(self) -> tuple[str, dict[str, Any]]:
        """The autoencoder's folder or hub id, and the arguments that say where in it."""
        if self.vae:
            return locate(self.vae), {}
        return self.location, {"subfolder": "vae", "revision": self.revision}

    def load_vae(self, dtype: torch.dtype) -> Any:
        """The autoencoder that is used with this base model, in this precision."""
        source, where = self._vae_source
        return self.autoencoder_type.from_pretrained(source, **where, dtype=dtype)

    def describe_vae(self, dtype: torch.dtype) -> Any:
        """The autoencoder without weights (meta device): shape, scale and precision of latents."""
        with torch.device("meta"):
            return self.autoencoder_type.from_config(self.vae_config).type(dtype)

    def load_denoiser(self, dtype: torch.dtype) -> Any:
        """The denoiser alone, in this precision."""
        return self.denoiser_type.from_pretrained(
            self.location,
            subfolder=self.family.denoiser,
            revision=self.revision,
            dtype=dtype,
        )

    def load_pipeline(
        self, dtype: torch.dtype = torch.float32, parts: Mapping[str, Any] | None = None
    ) -> Any:
        """The text-to-image pipeline, with the autoencoder that is used with it.

        The safety checker is off, as in published evaluations; so is the progress bar.

        Args:
            dtype: precision of the weights.
            parts: components in place of the pipeline's own, which are then not loaded. A component
                that is None is left out.

        Raises:
            ValueError: for a pipeline that cannot be found or is of no known family.
        """
        components = dict(parts or {})
        if self.vae and "vae" not in components:
            components["vae"] = self.load_vae(dtype)
        if "safety_checker" in self.index:
            components["safety_checker"] = None
        pipeline_type = getattr(diffusers, self.family.pipeline)
        pipe = pipeline_type.from_pretrained(
            self.location, revision=self.revision, dtype=dtype, **components
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def check_autoencoder(vae: str) -> None:
    """Find an autoencoder's config; no weight is read.

    Args:
        vae: a folder, a hub id or `asset:<name>`.

    Raises:
        ValueError: where there is none.
    """
    folder = Path(locate(vae))
    if (folder / "config.json").is_file():
        return
    if folder.exists() or not is_hub_id(vae):
        raise ValueError(
            f"vae={vae} is no autoencoder's folder: it has no config.json; give such a folder "
            "or a hub id such as org/name"
        )
    try:
        fetch(vae, "config.json")
    except OSError as error:
        raise ValueError(
            f"the autoencoder {vae} is no local folder and could not be read from the hub ({error})"
        ) from error
