"""A base model: where it lies, which family it is of, and its parts, loaded one by one.

Weights are read as they are published: in one file or in shards, plain or in a variant (`fp16`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from deradiff.assets import locate
from deradiff.hub import fetch, is_hub_id, listing, not_fetched
from deradiff.models.component_files import CONFIG, Component, components_of
from deradiff.models.families import Family, family_of_index
from deradiff.models.single_files import autoencoder_refusal, base_refusal, is_single_file
from deradiff.models.weight_headers import check_fetched, check_whole, has_scaled_float8
from deradiff.text_files import read_json

INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
"""The libraries whose classes read components, by their names in the index."""

AUTOENCODER = Component("", "diffusers", "AutoencoderKL")
"""An autoencoder with a folder or repository of its own, which it is the root of."""

TEXT_ENCODER = "text_encoder"
"""Beginning of the names of the components that read a prompt."""

NEVER_LOADED = ("safety_checker",)
"""Components that are left out of every pipeline."""


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
                raise ValueError(_no_index(self.location))
            return file
        if is_single_file(self.location):
            raise ValueError(base_refusal(self.location))
        if not is_hub_id(self.location):
            raise ValueError(
                f"there is no pipeline folder {self.location}; give a folder with a {INDEX} or a "
                "hub id such as org/name"
            )
        try:
            return fetch(self.location, INDEX, self.revision)
        except OSError as error:
            raise ValueError(not_fetched("a pipeline", self.location, error, "base")) from error

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of `model_index.json`.

        Raises:
            ValueError: where there is none.
        """
        return read_json(self.index_file)

    @cached_property
    def family(self) -> Family:
        """The family that the index names.

        Raises:
            ValueError: where there is no index, or for a pipeline of no known family.
        """
        return family_of_index(self.index, self.location)

    @cached_property
    def file_names(self) -> frozenset[str]:
        """The paths of the files in the folder or on the hub: those of the root and of components.

        Where the hub does not answer, they are those of its cached copy.

        Raises:
            ValueError: where neither answers.
        """
        folder = Path(self.location)
        if not folder.is_dir():
            try:
                return frozenset(listing(self.location, self.revision)[1])
            except OSError as error:
                raise ValueError(not_fetched("a pipeline", self.location, error, "base")) from error
        files = [path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file()]
        return frozenset(path.relative_to(folder).as_posix() for path in files)

    @cached_property
    def components(self) -> dict[str, Component]:
        """The components that are loaded from this place, by name."""
        components = {}
        for component in components_of(self.index):
            is_replaced = component.folder == "vae" and self.vae is not None
            if component.folder not in NEVER_LOADED and not is_replaced:
                components[component.folder] = component
        return components

    def check(self, names: Collection[str] | None = None) -> None:
        """Find the index, and the files of all components; no weight is read.

        Args:
            names: of the components that are needed; None: all, with the autoencoder that is used.

        Raises:
            ValueError: where one of them cannot be found, or for a pipeline of no known family.
        """
        if self.vae and (names is None or "vae" in names):
            check_autoencoder(self.vae)
        assert self.family
        for name, component in self.components.items():
            if names is not None and name not in names:
                continue
            _check_component(component, self.file_names, self.source, Path(self.location))

    def _variant(self, name: str) -> str | None:
        """The variant of a component's weights, such as `fp16`; None: the plain files."""
        component = self.components.get(name)
        weights = component.weights(self.file_names) if component else None
        return weights.variant if weights else None

    def read_json(self, name: str) -> dict[str, Any]:
        """A small JSON file of the base model.

        Args:
            name: its path in the folder, such as `scheduler/scheduler_config.json`.

        Raises:
            ValueError: where the file cannot be read.
        """
        if Path(self.location).is_dir():
            file = Path(self.location) / name
            if not file.is_file():
                raise ValueError(f"{self.location} is not complete: it has no {name}")
            return read_json(file)
        try:
            file = fetch(self.location, name, self.revision)
        except OSError as error:
            what = f"{name} of a pipeline"
            raise ValueError(not_fetched(what, self.location, error, "base")) from error
        return read_json(file)

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
        variant = autoencoder_variant(self.vae) if self.vae else self._variant("vae")
        return self.autoencoder_type.from_pretrained(source, **where, variant=variant, dtype=dtype)

    def describe_vae(self, dtype: torch.dtype) -> Any:
        """The autoencoder without weights (meta device): shape, scale and precision of latents."""
        with torch.device("meta"):
            return self.autoencoder_type.from_config(self.vae_config).type(dtype)

    def describe_text_encoders(self, dtype: torch.dtype) -> list[Any]:
        """The text encoders without weights (meta device), whose sizes they say."""
        encoders = []
        for name, component in self.components.items():
            if name.startswith(TEXT_ENCODER) and component.library == "transformers":
                network_type = getattr(transformers, component.class_name)
                config = network_type.config_class.from_dict(self.read_json(f"{name}/{CONFIG}"))
                with torch.device("meta"):
                    encoders.append(network_type(config).to(dtype))
        return encoders

    def load_denoiser(self, dtype: torch.dtype) -> Any:
        """The denoiser alone, in this precision."""
        return self.denoiser_type.from_pretrained(
            self.location,
            subfolder=self.family.denoiser,
            revision=self.revision,
            variant=self._variant(self.family.denoiser),
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
        for name, component in self.components.items():
            is_known = component.library in LIBRARIES
            if name not in components and is_known and self._variant(name) is not None:
                components[name] = self._load_variant(name, dtype)
        pipeline_type = getattr(diffusers, self.family.pipeline)
        pipe = pipeline_type.from_pretrained(
            self.location, revision=self.revision, dtype=dtype, **components
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _load_variant(self, name: str, dtype: torch.dtype) -> Any:
        """A network of the pipeline whose weights are there in a variant alone.

        diffusers' pipelines take one variant for all components that have it, and it would come
        before the plain files of the others.
        """
        component = self.components[name]
        network_type = getattr(LIBRARIES[component.library], component.class_name)
        return network_type.from_pretrained(
            self.location,
            subfolder=name,
            revision=self.revision,
            variant=self._variant(name),
            dtype=dtype,
        )


def _no_index(folder: str) -> str:
    """What to say of a folder that is no pipeline; it may hold one in a single file."""
    message = f"{folder} is not a diffusers pipeline: it has no {INDEX}"
    files = [path for path in Path(folder).glob("*.safetensors") if path.is_file()]
    if len(files) == 1 and not (Path(folder) / CONFIG).is_file():
        return f"{message}, but {base_refusal(str(files[0]))}"
    return message


def check_autoencoder(vae: str) -> None:
    """Find an autoencoder's config and weights; no weight is read.

    Args:
        vae: a folder, a hub id or `asset:<name>`.

    Raises:
        ValueError: where there is none.
    """
    folder = Path(locate(vae))
    if not (folder / CONFIG).is_file():
        if is_single_file(vae) and folder.is_file():
            raise ValueError(autoencoder_refusal(vae, AUTOENCODER.class_name))
        if folder.exists() or not is_hub_id(vae):
            raise ValueError(
                f"vae={vae} is no autoencoder's folder: it has no config.json; give such a folder "
                "or a hub id such as org/name"
            )
        try:
            fetch(vae, CONFIG)
        except OSError as error:
            raise ValueError(not_fetched("an autoencoder", vae, error, "vae")) from error
    _check_component(AUTOENCODER, _autoencoder_names(vae), vae, folder)


def autoencoder_variant(vae: str) -> str | None:
    """The variant of an autoencoder's weights, such as `fp16`; None: the plain files.

    Args:
        vae: a folder, a hub id or `asset:<name>`.
    """
    weights = AUTOENCODER.weights(_autoencoder_names(vae))
    return weights.variant if weights else None


def _autoencoder_names(vae: str) -> list[str]:
    """The files in an autoencoder's folder or repository."""
    folder = Path(locate(vae))
    if folder.is_dir():
        return [path.name for path in folder.iterdir() if path.is_file()]
    try:
        return listing(vae)[1]
    except OSError as error:
        raise ValueError(not_fetched("an autoencoder", vae, error, "vae")) from error


def _check_component(
    component: Component, names: Collection[str], source: str, folder: Path
) -> None:
    """Raise ValueError where a file of a component is missing, or cannot be used.

    Args:
        component: the component.
        names: the paths of all files.
        source: how an error names the place.
        folder: the place; only in a local one is more than the names known.
    """
    # Is everything there?
    missing = component.missing(names)
    if missing is not None:
        remedy = "fetch or copy the rest of it"
        if not folder.is_dir():
            remedy = (
                f"give another one, or, if its cached copy is incomplete, run hf download {source} "
                "where there is a network"
            )
        raise ValueError(f"{source} is not complete: it has no {missing}; {remedy}")

    # Are the weights of this folder what they should be?
    weights = component.weights(names) if component.is_network else None
    if weights is None or not folder.is_dir():
        return
    for path in weights.files:
        name = f"{path} of {source}"
        check_fetched(folder / path, name)
        if weights.format != "safetensors":
            continue
        check_whole(folder / path, name)
        if has_scaled_float8(folder / path):
            raise ValueError(
                f"{name} is float8 with scales, which a base model's folder cannot hold, because "
                "diffusers ignores the scales: give the base in float16, bfloat16 or float32"
            )
