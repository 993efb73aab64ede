"""Aligned models as files: where an anchor lies, what its card says of it, and how it is saved.

Besides our own anchors, those of other trainers are read: a LoRA of diffusers, peft, kohya or TRL;
a `unet/` or `transformer/` folder, alone, at the root or in a whole pipeline; one file with a whole
network; each in a folder or on the hub.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import parse_safetensors_file_metadata
from peft.utils import get_peft_model_state_dict
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
from deradiff.models.base_model import INDEX, BaseModel
from deradiff.models.families import DENOISERS, FAMILIES, family_of_config

BETA_CONVENTION = "mean-half"
"""What our betas multiply: half the difference of two errors, each a mean over C, H and W."""

CARD = "anchor.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_SIGNS = ("lora", "hada_", "lokr_")
"""Parts of the names of an adapter's tensors that no network's tensors have."""


@dataclass(kw_only=True)
class AnchorCard:
    """The content of `anchor.json`: what an anchor was aligned from, how, and at what cost.

    Attributes:
        base_model: a hub id or path.
        base_revision: the branch, tag or commit of the hub.
        vae: the source of the autoencoder, where it was not the base model's own.
        family: a key of `deradiff.models.families.FAMILIES`.
        method: `lora` or `full`.
        beta: as the loss has it, by `beta_convention`; None: unknown.
        beta_convention: what beta multiplies; of our own anchors BETA_CONVENTION.
        objective: what it was trained by.
        steps: optimiser steps.
        pairs_seen: training pairs, with repetitions.
        dataset: what the pairs are.
        seed: of the training.
        git_commit: of the code; None: it was no checkout.
        versions: of the packages, by name.
        gpu_hours: of the whole training.
        device: that it was trained on.
        flops: of the whole training.

    Raises:
        ValueError: for another method, and for a beta that is not above 0.
    """

    base_model: str
    base_revision: str | None = None
    vae: str | None = None
    family: str
    method: str
    beta: float | None
    beta_convention: str = BETA_CONVENTION
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
        if self.beta is None:
            return
        if not isinstance(self.beta, int | float) or not self.beta > 0:
            raise ValueError(
                "an anchor's beta is a number above 0, or null where it is unknown, not "
                f"{self.beta!r}"
            )


@dataclass
class Anchor:
    """An aligned model whose weights are not read yet.

    They are read when `realign` needs them. A full network is kept from then on.

    Attributes:
        source: as the user named it.
        root: the folder or hub id.
        weights: the folder below the root, or the file: always one for a LoRA.
        method: `lora` or `full`.
        card: None for anchors of other trainers, whose beta is therefore unknown.
        family: its name; None where only the layers can tell.
        revision: the branch, tag or commit of the hub.
        variant: of diffusers' files, such as `fp16`.
        peft: the content of peft's `adapter_config.json`.
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
        """The network of a full anchor, for inference.

        For another precision it is read again, because casting to a lower one loses bits.

        Args:
            like: a network of the same architecture, the reference.
            device: where the network is wanted.
            dtype: its precision.

        Raises:
            ValueError: for files that do not hold all of such a network.
        """
        if self._network is None or self._network.dtype != dtype:
            if self.weights.endswith(".safetensors"):
                file = self.file(self.weights)
                self._network = read_network(file, like, dtype, f"the anchor {self.source}")
            else:
                self._network = self._from_folder(like, dtype)
            self._network.requires_grad_(False)
        if self._network.device != device:
            self._network.to(device)
        return self._network

    def _from_folder(self, like: Any, dtype: torch.dtype) -> nn.Module:
        """The network in a folder of diffusers' layout."""
        try:
            network, report = type(like).from_pretrained(
                self.root,
                subfolder=self.weights or None,
                revision=self.revision,
                variant=self.variant,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
            )
        except OSError as error:
            raise ValueError(
                f"the anchor {self.source} holds no safetensors weights that diffusers can read: "
                f"{error}"
            ) from error
        # diffusers leaves missing weights at random values.
        missing = report["missing_keys"]
        if missing:
            raise ValueError(
                f"the anchor {self.source} holds no whole {type(like).__name__}: {min(missing)} is "
                "missing"
            )
        return network

    def lora(self, pipe: Any) -> LoraWeights:
        """The weights of a LoRA anchor for the pipeline's denoiser, in peft's names.

        Raises:
            ValueError: for a file that is not a LoRA on that denoiser alone.
        """
        return read_lora(self.file(self.weights), self.peft, pipe, f"the LoRA anchor {self.source}")

    def file(self, name: str) -> Path:
        """The path of one of its files, which is fetched if it lies on the hub."""
        if Path(self.root).is_dir():
            return Path(self.root) / name
        return hub.fetch(self.root, name, self.revision)


def save_anchor(path: Path, denoiser: nn.Module, card: AnchorCard) -> None:
    """Write an anchor folder: the weights as stock diffusers loads them, then the card.

    Args:
        path: the folder.
        denoiser: the trained network. With `card.method` `lora` it holds a peft adapter named
            `default`, which is saved with its alpha; with `full` it is plain.
        card: what `anchor.json` will say.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    family = FAMILIES[card.family]
    if card.method == "full":
        denoiser.save_pretrained(path / family.denoiser)  # type: ignore[operator]
    else:
        _save_lora(path, denoiser, card)
    write_atomic(path / CARD, json.dumps(asdict(card), indent=2) + "\n")


def _save_lora(path: Path, denoiser: Any, card: AnchorCard) -> None:
    family = FAMILIES[card.family]
    config = denoiser.peft_config["default"].to_dict()
    for key, value in config.items():
        if isinstance(value, set):
            config[key] = sorted(value)
    state = get_peft_model_state_dict(denoiser, adapter_name="default")
    options = {
        f"{family.denoiser}_lora_layers": state,
        f"{family.denoiser}_lora_adapter_metadata": config,
    }
    getattr(diffusers, family.pipeline).save_lora_weights(path, **options)


def load_anchor(source: str | Path | Anchor, revision: str | None = None) -> Anchor:
    """Find an anchor, and read its card. Its weights load later.

    Args:
        source: one of

            - a folder of `save_anchor`, or the directory of the train run that wrote it;
            - a folder or hub id (`org/name`) with a `unet/` or `transformer/` of diffusers, or with
              that network at its root;
            - a folder or hub id with a LoRA of diffusers, TRL or peft;
            - a `.safetensors` file of a LoRA or of a whole network; on the hub
              `org/name/file.safetensors`;
            - an `Anchor`, which is returned as it is.
        revision: a branch, tag or commit of the hub.

    Raises:
        ValueError: where there is no anchor, or its kind cannot be told.
    """
    if isinstance(source, Anchor):
        return source
    source = str(source)
    files = _find(source, revision)
    card = _read_card(files, source)

    # TRL saves its LoRA beside the whole pipeline, whose UNet then has its layers wrapped: there
    # the LoRA is the anchor.
    has_lora_file = LORA_FILE in files.names or PEFT_FILE in files.names
    if files.requested is None and not has_lora_file:
        anchor = _full_anchor(files, source, card)
        if anchor:
            return anchor

    anchor = Anchor(
        source=source,
        root=files.root,
        weights=files.requested or _only_weights(files.names, source),
        method="lora",
        card=card,
        family=card.family if card else None,
        revision=revision,
    )
    if anchor.weights == PEFT_FILE and PEFT_CONFIG in files.names:
        anchor.peft = files.read_json(PEFT_CONFIG)
        check_config(anchor.peft, f"the LoRA anchor {source}")
    elif anchor.weights not in (LORA_FILE, PEFT_FILE):
        _recognise_network(anchor)
    return anchor


def read_card(source: str | Path | Anchor, revision: str | None = None) -> AnchorCard | None:
    """An anchor's card; None for anchors without one. No weight is read.

    Args:
        source: as `load_anchor` takes it.
        revision: a branch, tag or commit of the hub.

    Raises:
        ValueError: where there is no anchor.
    """
    return load_anchor(source, revision).card


def check_anchor_family(source: str | Path | Anchor, family: str) -> Anchor:
    """Find an anchor, and check its family as far as its files tell it. No weight is read.

    Args:
        source: as `load_anchor` takes it.
        family: of the pipeline.

    Raises:
        ValueError: where there is no anchor, or one of another family.
    """
    anchor = load_anchor(source)
    if anchor.family not in (None, family):
        raise ValueError(
            f"the anchor {anchor.source} is of family {anchor.family} and the pipeline of "
            f"{family}: give both of one family"
        )
    return anchor


@dataclass(frozen=True)
class _Files:
    """The files among which an anchor is looked for.

    Attributes:
        root: a folder or hub id.
        names: of the files below the root that may say something about an anchor.
        requested: the one file that the user asked for; None: the whole folder.
        revision: the branch, tag or commit of the hub.
    """

    root: str
    names: list[str]
    requested: str | None
    revision: str | None

    def read_json(self, name: str) -> dict[str, Any]:
        """The content of a small JSON file."""
        if Path(self.root).is_dir():
            return json.loads((Path(self.root) / name).read_text())
        return hub.fetch_json(self.root, name, self.revision)


def _find(source: str, revision: str | None) -> _Files:
    """The files of a source: a file, a folder or a hub id. Raises ValueError."""
    path = Path(source)
    if path.is_file():
        names = [name for name in (path.name, PEFT_CONFIG) if (path.parent / name).is_file()]
        return _Files(str(path.parent), names, path.name, revision)
    if path.is_dir():
        # A train run's directory holds its anchor in a folder.
        if (path / "anchor" / CARD).is_file():
            path = path / "anchor"
        names = []
        for pattern in ("*", "*/config.json", "*/*.safetensors*"):
            files = [file for file in path.glob(pattern) if file.is_file()]
            names += [file.relative_to(path).as_posix() for file in files]
        return _Files(str(path), names, None, revision)
    return _find_on_hub(source, revision)


def _find_on_hub(source: str, revision: str | None) -> _Files:
    """The files of `org/name`, or of `org/name/file.safetensors`. Raises ValueError."""
    parts = source.split("/")
    repo = "/".join(parts[:2])
    requested = None
    if len(parts) == 3 and source.endswith(".safetensors"):
        requested = parts[2]
    expected_parts = 3 if requested else 2
    if not hub.is_hub_id(repo) or len(parts) != expected_parts:
        raise ValueError(
            f"there is no anchor {source}: give a folder or LoRA file that exists, or a hub id "
            "such as org/name"
        )
    try:
        root, names = hub.listing(repo, revision)
    except OSError as error:
        raise ValueError(
            f"there is no anchor {repo}: no local folder, and the hub did not list it ({error}); "
            "give a folder that exists or a hub id such as org/name"
        ) from error
    return _Files(root, names, requested, revision)


def _read_card(files: _Files, source: str) -> AnchorCard | None:
    """The card, without keys that a later version may have added. Raises ValueError."""
    if CARD not in files.names:
        return None
    values = files.read_json(CARD)
    known = {card_field.name for card_field in fields(AnchorCard)}
    try:
        return AnchorCard(**{key: value for key, value in values.items() if key in known})
    except TypeError as error:
        reason = str(error).removeprefix("AnchorCard.__init__() ")
        raise ValueError(f"the card {source}/{CARD} is incomplete: {reason}") from error


def _full_anchor(files: _Files, source: str, card: AnchorCard | None) -> Anchor | None:
    """The anchor of a folder that holds a denoiser in diffusers' layout; None for other folders."""
    for folder in (*DENOISERS, ""):
        config_name = f"{folder}/config.json".removeprefix("/")
        if config_name not in files.names:
            continue
        family = family_of_config(files.read_json(config_name))
        if family is None:
            continue
        # The pipeline's index tells families apart whose denoisers have one class.
        if INDEX in files.names:
            family = BaseModel(files.root, files.revision).family
        return Anchor(
            source=source,
            root=files.root,
            weights=folder,
            method="full",
            card=card,
            family=card.family if card else family.name,
            revision=files.revision,
            variant=_variant(files.names, folder),
        )
    return None


def _variant(names: list[str], folder: str) -> str | None:
    """`fp16` where a denoiser's weights are there in that variant alone."""
    endings = []
    for name in names:
        if folder in ("", name.split("/")[0]):
            _, _, ending = name.removeprefix(f"{folder}/").partition(".")
            endings.append(ending)
    if "safetensors" in endings or "safetensors.index.json" in endings:
        return None
    for ending in endings:
        if ending.startswith("fp16.safetensors") or ending.endswith("index.fp16.json"):
            return "fp16"
    return None


def _only_weights(names: list[str], source: str) -> str:
    """The LoRA file of a folder by its usual name, or the only file of weights. Raises ValueError.

    The folder is not one of diffusers' denoisers.
    """
    files = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    for name in (LORA_FILE, PEFT_FILE):
        if name in files:
            return name
    if len(files) == 1:
        return files[0]
    if files:
        content = f"several files ({', '.join(sorted(files))}): add the file's name to the anchor"
    else:
        folders = "/ nor a ".join(DENOISERS)
        content = f"neither a {folders}/ nor a LoRA file"
    raise ValueError(f"{source} is no anchor that deradiff can read: it holds {content}")


def _recognise_network(anchor: Anchor) -> None:
    """Note that an anchor's file is a whole network, where the names of its tensors say so."""
    names = _tensor_names(anchor)
    for name in names:
        if any(sign in name for sign in ADAPTER_SIGNS):
            return
    family = original_family(names)
    anchor.method = "full"
    anchor.family = family.name if family else None


def _tensor_names(anchor: Anchor) -> list[str]:
    """The names of the tensors in an anchor's file. Raises ValueError.

    Of a file on the hub only the header is read.
    """
    try:
        if Path(anchor.root).is_dir():
            return keys_of(anchor.file(anchor.weights))
        header = parse_safetensors_file_metadata(
            anchor.root, anchor.weights, revision=anchor.revision
        )
        return list(header.tensors)
    # No such file, no network, or a file of something else: each has an error of its own.
    except Exception as error:
        raise ValueError(
            f"{anchor.source} is no safetensors file that can be read ({type(error).__name__})"
        ) from error
