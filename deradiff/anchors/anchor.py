"""Anchors on disk: what an aligned model is called, how it was made (its card), and how its weights are saved and found.

Ours, and what other trainers wrote: a LoRA of diffusers, peft, kohya or TRL, a `unet/` or `transformer/` folder, a whole pipeline with
one, a denoiser at the root, one file with a whole network; a folder or a hub id.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deradiff import hub
from deradiff.anchors.lora_files import (
    PEFT_CONFIG,
    PEFT_FILE,
    LoraWeights,
    check_config,
    keys_of,
    read_lora,
)
from deradiff.anchors.single_files import original_family, read_network
from deradiff.files import write_atomic
from deradiff.models.base_model import BaseModel
from deradiff.models.families import DENOISERS, FAMILIES, family_of_config

CARD = "anchor.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_SIGNS = (
    "lora",
    "hada_",
    "lokr_",
)  # in the names of an adapter's tensors, and in no network's


@dataclass(kw_only=True)
class AnchorCard:
    """`anchor.json`: what an anchor was aligned from and how, and what that cost.

    base_model: hub id or path. vae: of an autoencoder in place of the base's own. family: a key of `families.FAMILIES`. method: `lora`
    or `full`. beta: as the loss has it, by `beta_convention` (`mean-half`: it multiplies half the mean squared error); None where
    nobody said. flops: of the whole training.
    Raises ValueError for a method or a beta that cannot be.
    """

    base_model: str
    base_revision: str | None = None
    vae: str | None = None
    family: str
    method: str
    beta: float | None
    beta_convention: str = "mean-half"
    objective: str = "dpo"
    steps: int = 0
    pairs_seen: int = 0
    dataset: str = ""
    seed: int = 0
    git_commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    gpu_hours: float = 0.0
    device: str = ""
    flops: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in ("lora", "full"):
            raise ValueError(f"an anchor's method is lora or full, not {self.method!r}")
        if self.beta is not None and not (isinstance(self.beta, int | float) and self.beta > 0):
            raise ValueError(
                f"an anchor's beta is a number above 0, or null where it is not known, not {self.beta!r}"
            )


@dataclass
class Anchor:
    """An aligned model that was found but not read: weights load when `realign` needs them, and a full network is kept from then on.

    source: as the user named it. root: the folder or hub id. weights: the folder below it, or the one file (`lora`, and some of `full`).
    card: None for anchors of other trainers, whose beta is therefore not known. family: None where only the layers can tell.
    variant: of diffusers' files, such as `fp16`. peft: what peft's `adapter_config.json` says.
    """

    source: str
    root: str
    weights: str
    method: str
    card: AnchorCard | None = None
    family: str | None = None
    revision: str | None = None
    variant: str | None = None
    peft: dict[str, Any] | None = None
    _network: Any = field(default=None, repr=False)

    def network(self, like: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The full anchor's network, of the class of `like`, for inference. Read again when another dtype is asked for: casts lose bits."""
        if self._network is None or self._network.dtype != dtype:
            if self.weights.endswith(".safetensors"):
                self._network = read_network(
                    self.file(self.weights), like, dtype, f"the anchor {self.source}"
                )
            else:
                self._network = self._pretrained(like, dtype)
            self._network.requires_grad_(False)
        if self._network.device != device:
            self._network.to(device)
        return self._network

    def _pretrained(self, like: Any, dtype: torch.dtype) -> nn.Module:
        where: dict[str, Any] = {
            "subfolder": self.weights or None,
            "revision": self.revision,
            "variant": self.variant,
        }
        try:
            network, read = type(like).from_pretrained(
                self.root, **where, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        except OSError as error:
            raise ValueError(
                f"the anchor {self.source} holds no safetensors weights that diffusers can read: {error}"
            ) from error
        if read["missing_keys"]:  # diffusers would leave them random
            raise ValueError(
                f"the anchor {self.source} holds no whole {type(like).__name__}: {min(read['missing_keys'])} is missing"
            )
        return network

    def lora(self, pipe: Any) -> LoraWeights:
        """The LoRA's weights for the pipeline's denoiser, in peft's names, whoever wrote them. ValueError for one of another."""
        return read_lora(self.file(self.weights), self.peft, pipe, f"the LoRA anchor {self.source}")

    def file(self, name: str) -> Path:
        """A file of the anchor's, fetched from the hub where it lies there."""
        return (
            Path(self.root) / name
            if Path(self.root).is_dir()
            else hub.fetch(self.root, name, self.revision)
        )


def save_anchor(path: Path, denoiser: nn.Module, card: AnchorCard) -> None:
    """Write an anchor folder: the weights as stock diffusers loads them, then the card.

    denoiser: with a peft adapter "default" (card.method `lora`: saved with its alpha), or a plain trained network (`full`).
    """
    path, family = Path(path), FAMILIES[card.family]
    path.mkdir(parents=True, exist_ok=True)
    if card.method == "full":
        denoiser.save_pretrained(path / family.denoiser)  # type: ignore[operator]
    else:
        import diffusers
        from peft.utils import get_peft_model_state_dict

        config = denoiser.peft_config["default"].to_dict()  # type: ignore[index, union-attr]
        metadata = {
            key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
        }
        layers = {
            f"{family.denoiser}_lora_layers": get_peft_model_state_dict(
                denoiser, adapter_name="default"
            )
        }
        getattr(diffusers, family.pipeline).save_lora_weights(
            path, **layers, **{f"{family.denoiser}_lora_adapter_metadata": metadata}
        )
    write_atomic(path / CARD, json.dumps(asdict(card), indent=2) + "\n")


def load_anchor(source: str | Path | Anchor, revision: str | None = None) -> Anchor:
    """Find an anchor and read its card; its weights load later. An `Anchor` is returned as it is.

    source: a folder of `save_anchor`, or the train run that wrote it; a diffusers folder or hub id (`org/name`) with a `unet/` or
    `transformer/` or with that network at its root; a LoRA folder of diffusers, TRL or peft; a `.safetensors` file of a LoRA or of a whole
    network, on the hub `org/name/file.safetensors`. revision: a branch, tag or commit on the hub.
    Raises ValueError, in one sentence, where there is none or its kind cannot be told.
    """
    if isinstance(source, Anchor):
        return source
    source = str(source)
    root, names, file = _find(source, revision)
    card = _card(_read(root, CARD, revision), source) if CARD in names else None
    # TRL saves its LoRA beside the whole pipeline, whose UNet then has its layers wrapped: the LoRA is the anchor.
    whole = (
        None if file or LORA_FILE in names or PEFT_FILE in names else _whole(root, names, revision)
    )
    if whole:
        folder, family = whole
        return Anchor(
            source,
            root,
            folder,
            "full",
            card,
            card.family if card else family,
            revision,
            _variant(names, folder),
        )
    anchor = Anchor(
        source,
        root,
        file or _only_file(names, source),
        "lora",
        card,
        card.family if card else None,
        revision,
    )
    if anchor.weights == PEFT_FILE and PEFT_CONFIG in names:
        anchor.peft = _read(root, PEFT_CONFIG, revision)
        check_config(anchor.peft, f"the LoRA anchor {source}")
    elif anchor.weights not in (LORA_FILE, PEFT_FILE):
        keys = _keys(anchor)
        if not any(sign in key for key in keys for sign in ADAPTER_SIGNS):
            family = original_family(keys)
            anchor.method, anchor.family = "full", family.name if family else None
    return anchor


def read_card(source: str | Path | Anchor, revision: str | None = None) -> AnchorCard | None:
    """An anchor's card, or None for anchors without one. No weights are read. Raises ValueError where the anchor does not exist."""
    return load_anchor(source, revision).card


def check_anchor_family(source: str | Path | Anchor, family: str) -> Anchor:
    """The anchor, after ValueError for one that its card, index or config says is of another family. Reads no weights."""
    anchor = load_anchor(source)
    if anchor.family not in (None, family):
        raise ValueError(
            f"the anchor {anchor.source} is of family {anchor.family} and the pipeline of {family}: give both of one family"
        )
    return anchor


def _find(source: str, revision: str | None) -> tuple[str, list[str], str | None]:
    """The folder or hub id, the names of the files in it that may say something about an anchor, and the one that was asked for."""
    path = Path(source)
    if path.is_file():
        return (
            str(path.parent),
            [name for name in (path.name, PEFT_CONFIG) if (path.parent / name).is_file()],
            path.name,
        )
    if path.is_dir():
        path = (
            path / "anchor" if (path / "anchor" / CARD).is_file() else path
        )  # a train run's directory
        found = (*path.glob("*"), *path.glob("*/config.json"), *path.glob("*/*.safetensors*"))
        return (
            str(path),
            [file.relative_to(path).as_posix() for file in found if file.is_file()],
            None,
        )
    parts = source.split("/")
    file = parts[2] if len(parts) == 3 and source.endswith(".safetensors") else None
    repo = "/".join(parts[:2])
    if not hub.is_hub_id(repo) or len(parts) != (3 if file else 2):
        raise ValueError(
            f"there is no anchor {source}: give a folder or LoRA file that exists, or a hub id such as org/name"
        )
    try:
        return *hub.listing(repo, revision), file
    except OSError as error:
        said = f"no local folder, and the hub did not list it ({error})"
        raise ValueError(
            f"there is no anchor {repo}: {said}; give a folder that exists or a hub id such as org/name"
        ) from error


def _read(root: str, name: str, revision: str | None) -> dict[str, Any]:
    """A small json file of a folder or hub id."""
    return (
        json.loads((Path(root) / name).read_text())
        if Path(root).is_dir()
        else hub.fetch_json(root, name, revision)
    )


def _only_file(names: list[str], source: str) -> str:
    """The weights of a folder that is no denoiser's: a LoRA under its usual name, or whatever single file there is."""
    files = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    for name in (LORA_FILE, PEFT_FILE, *files[: len(files) == 1]):
        if name in files:
            return name
    several = f"several files ({', '.join(sorted(files))}): add the file's name to the anchor"
    folders = "/ nor a ".join(DENOISERS)
    raise ValueError(
        f"{source} is no anchor that deradiff can read: it holds {several if files else f'neither a {folders}/ nor a LoRA file'}"
    )


def _keys(anchor: Anchor) -> list[str]:
    """The names of the tensors in an anchor's file; of the hub's, only its header is read. Raises ValueError."""
    from huggingface_hub import parse_safetensors_file_metadata

    try:
        if Path(anchor.root).is_dir():
            return keys_of(anchor.file(anchor.weights))
        return list(
            parse_safetensors_file_metadata(
                anchor.root, anchor.weights, revision=anchor.revision
            ).tensors
        )
    except Exception as error:  # no such file there, no network, or a file of something else
        raise ValueError(
            f"{anchor.source} is no safetensors file that can be read ({type(error).__name__})"
        ) from error


def _whole(root: str, names: list[str], revision: str | None) -> tuple[str, str] | None:
    """The folder of a denoiser in diffusers' layout, "" for the root, and its family."""
    for folder in (*DENOISERS, ""):
        name = f"{folder}/config.json".removeprefix("/")
        config = _read(root, name, revision) if name in names else {}
        family = family_of_config(config)
        if family and "model_index.json" in names:
            return folder, BaseModel(root, revision).family.name
        if family:
            return folder, family.name
    return None


def _variant(names: list[str], folder: str) -> str | None:
    """`fp16` where a denoiser's weights are there in that variant alone."""
    stems = {
        name.removeprefix(f"{folder}/").split(".", 1)[-1]
        for name in names
        if folder in ("", name.split("/")[0])
    }
    plain = any(stem in ("safetensors", "safetensors.index.json") for stem in stems)
    return (
        "fp16"
        if not plain
        and any(
            stem.startswith("fp16.safetensors") or stem.endswith("index.fp16.json")
            for stem in stems
        )
        else None
    )


def _card(values: dict[str, Any], source: str) -> AnchorCard:
    known = {f.name for f in fields(AnchorCard)}
    try:
        return AnchorCard(**{key: value for key, value in values.items() if key in known})
    except TypeError as error:
        raise ValueError(
            f"the card {source}/{CARD} is incomplete: {str(error).removeprefix('AnchorCard.__init__() ')}"
        ) from error
