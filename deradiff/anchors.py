"""Anchors on disk: what an aligned model is called, how it was made (its card), and how its weights are saved and found.

Ours, and what other trainers wrote: a LoRA file, a `unet/` folder, a whole pipeline with one, a UNet at the root; a folder or a hub id.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deradiff.families import FAMILIES, checkpoint_family, family_of
from deradiff.runs import write_atomic

CARD = "anchor.json"
LORA_FILE = "pytorch_lora_weights.safetensors"


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
            raise ValueError(f"an anchor's beta is a number above 0, or null where it is not known, not {self.beta!r}")


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA as diffusers reads it: `state` with keys below the denoiser's name, kohya's `alphas` or peft's `metadata` for its scale."""

    state: dict[str, Tensor]
    alphas: dict[str, float] | None
    metadata: dict[str, Any] | None


@dataclass
class Anchor:
    """An aligned model that was found but not read: weights load when `realign` needs them, and a full network is kept from then on.

    source: as the user named it. root: the folder or hub id. weights: the folder below it (method `full`) or the file (`lora`).
    card: None for anchors of other trainers, whose beta is therefore not known. family: None where only the layers can tell.
    """

    source: str
    root: str
    weights: str
    method: str
    card: AnchorCard | None = None
    family: str | None = None
    revision: str | None = None
    _network: Any = field(default=None, repr=False)

    def network(self, like: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The full anchor's network, of the class of `like`, for inference. Read again when another dtype is asked for: casts lose bits."""
        if self._network is None or self._network.dtype != dtype:
            try:
                self._network = type(like).from_pretrained(  # type: ignore[attr-defined]
                    self.root, subfolder=self.weights or None, revision=self.revision, dtype=dtype, use_safetensors=True
                )
            except OSError as error:
                raise ValueError(f"the anchor {self.source} holds no safetensors weights that diffusers can read: {error}") from error
            self._network.requires_grad_(False)
        if self._network.device != device:
            self._network.to(device)
        return self._network

    def lora(self, pipe: Any) -> LoraWeights:
        """The LoRA's weights in diffusers' names, read by the pipeline's own loader from safetensors alone."""
        options = {"revision": self.revision, "weight_name": self.weights, "use_safetensors": True, "return_lora_metadata": True}
        config = getattr(pipe, family_of(pipe).denoiser).config
        return LoraWeights(*pipe.lora_state_dict(self.root, unet_config=config, **options))


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
        metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        layers = {f"{family.denoiser}_lora_layers": get_peft_model_state_dict(denoiser, adapter_name="default")}
        getattr(diffusers, family.pipeline).save_lora_weights(path, **layers, **{f"{family.denoiser}_lora_adapter_metadata": metadata})
    write_atomic(path / CARD, json.dumps(asdict(card), indent=2) + "\n")


def load_anchor(source: str | Path | Anchor, revision: str | None = None) -> Anchor:
    """Find an anchor and read its card; its weights load later. An `Anchor` is returned as it is.

    source: a folder of `save_anchor`; a diffusers folder or hub id (`org/name`) with a `unet/` or with a UNet at its root; a LoRA folder,
    `.safetensors` file, or `org/name/file.safetensors` on the hub. revision: a branch, tag or commit on the hub.
    Raises ValueError, in one sentence, where there is none or its kind cannot be told.
    """
    if isinstance(source, Anchor):
        return source
    source = str(source)
    root, names = _find(source, revision)
    card = _card(_read(root, CARD, revision), source) if CARD in names else None
    for denoiser in {family.denoiser for family in FAMILIES.values()}:
        for folder in (f"{denoiser}/", ""):
            config = _read(root, f"{folder}config.json", revision) if f"{folder}config.json" in names else {}
            if str(config.get("_class_name", "")).startswith("UNet2DCondition"):
                family = card.family if card else _family(root, names, config, revision)
                return Anchor(source, root, folder.rstrip("/"), "full", card, family, revision)
    files = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if LORA_FILE in files or len(files) == 1:
        return Anchor(source, root, LORA_FILE if LORA_FILE in files else files[0], "lora", card, card.family if card else None, revision)
    many = f"several files ({', '.join(sorted(files))}): add the file's name to the anchor" if files else "neither a unet/ nor a LoRA file"
    raise ValueError(f"{source} is no anchor that deradiff can read: it holds {many}")


def read_card(source: str | Path | Anchor, revision: str | None = None) -> AnchorCard | None:
    """An anchor's card, or None for anchors without one. No weights are read. Raises ValueError where the anchor does not exist."""
    return load_anchor(source, revision).card


def check_anchor_family(source: str | Path | Anchor, family: str) -> Anchor:
    """The anchor, after ValueError for one that its card, index or config says is of another family. Reads no weights."""
    anchor = load_anchor(source)
    if anchor.family not in (None, family):
        raise ValueError(f"the anchor {anchor.source} is of family {anchor.family} and the pipeline of {family}: give both of one family")
    return anchor


def _find(source: str, revision: str | None) -> tuple[str, list[str]]:
    """The folder or hub id, and the names of the files in it that may say something about an anchor."""
    path = Path(source)
    if path.is_file():
        return str(path.parent), [path.name]
    if path.is_dir():
        return source, [file.relative_to(path).as_posix() for file in (*path.glob("*"), *path.glob("*/config.json")) if file.is_file()]
    parts = source.split("/")
    named_file = parts[2:] if len(parts) == 3 and source.endswith(".safetensors") else []
    if source.startswith((".", "/", "runs/")) or len(parts) != 2 + len(named_file):
        raise ValueError(f"there is no anchor {source}: give a folder or LoRA file that exists, or a hub id such as org/name")
    root, names = _on_hub("/".join(parts[:2]), revision)
    return root, named_file or names


def _on_hub(repo: str, revision: str | None) -> tuple[str, list[str]]:
    """The hub id and its files; without a network the cached copy's folder and its files."""
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        return repo, list_repo_files(repo, revision=revision)
    except Exception as error:  # no network, no such repository, no access: the hub's client has a class of its own for each
        try:
            root = snapshot_download(repo, revision=revision, local_files_only=True)
        except OSError:
            said = f"no local folder, and the hub did not list it ({type(error).__name__})"
            raise ValueError(f"there is no anchor {repo}: {said}; give a folder that exists or a hub id such as org/name") from error
    return _find(root, None)


def _read(root: str, name: str, revision: str | None) -> dict[str, Any]:
    """A small json file of a folder or hub id."""
    if not Path(root).is_dir():
        from huggingface_hub import hf_hub_download

        return json.loads(Path(hf_hub_download(root, name, revision=revision)).read_text())
    return json.loads((Path(root) / name).read_text())


def _card(values: dict[str, Any], source: str) -> AnchorCard:
    known = {f.name for f in fields(AnchorCard)}
    try:
        return AnchorCard(**{key: value for key, value in values.items() if key in known})
    except TypeError as error:
        raise ValueError(f"the card {source}/{CARD} is incomplete: {str(error).removeprefix('AnchorCard.__init__() ')}") from error


def _family(root: str, names: list[str], config: dict[str, Any], revision: str | None) -> str:
    """The family of a full anchor without a card: by its pipeline's index, or by what its UNet is told besides the text."""
    if "model_index.json" in names:
        return checkpoint_family(root, revision).name
    return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd15"
