"""From what a user typed to a CLIP checkpoint: found, its layout told apart and checked, before a weight is read.

Two layouts exist: a Hugging Face folder (config.json of model_type `clip`, weights in CLIPModel's names) and a file that holds an open_clip
state dict (HPSv2's, and open_clip's own). The second is brought under the first's names; from there on there is one path.
"""

from __future__ import annotations

import glob
import json
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from deradiff.files import locate
from deradiff.hub import is_hub_id
from deradiff.scorers import open_clip
from deradiff.scorers.recipes import Recipe

FILES = (".pt", ".pth", ".bin", ".safetensors")
SHARDS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
)  # of a Hugging Face folder
TOKENIZER = ["tokenizer.json", "vocab.json"]  # either is enough
PROCESSOR = ["preprocessor_config.json", "processor_config.json"]
# older files carry these constants; transformers and open_clip make them themselves
CONSTANTS = (
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
    "attn_mask",
)


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies. said: as the user typed it. repo: a hub id, where the weights are yet to come from there.
    folder: on this machine. file: the state dict's name, or None for a Hugging Face folder."""

    said: str
    repo: str | None
    folder: Path
    file: str | None

    def weights(self) -> list[Path]:
        """The weight files, downloaded if need be. Raises ValueError where there are none."""
        for pattern in [glob.escape(self.file)] if self.file else SHARDS:
            folder = snapshot(self.repo, [pattern]) if self.repo else self.folder
            if found := sorted(folder.glob(pattern)):
                return found
        raise ValueError(
            f"the checkpoint {self.said} holds no {self.file or 'model.safetensors or pytorch_model.bin'}"
        )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose configuration (a CLIPConfig), tokenizer and image processor are read, and whose weights are not.

    read: the files that these were read from."""

    place: Place
    config: Any
    tokenizer: Any
    processor: Any
    read: tuple[Path, ...]

    def files(self) -> list[Path]:
        """All that decides what the network computes: its weights, and what was read."""
        return [*self.place.weights(), *self.read]

    def load(self) -> Any:
        """The network, a CLIPModel in float32, in evaluation mode. Raises ValueError where the weights are of another layout or size."""
        state = self._state("cpu")
        return CLIPModel.from_pretrained(
            None, config=self.config, state_dict=state, dtype=torch.float32
        ).eval()

    def check_weights(self) -> None:
        """Names and shapes of the weights against the configuration. Raises ValueError naming the first that differs."""
        self._state("meta")

    def _state(self, device: str) -> dict[str, Tensor]:
        files = self.place.weights()
        state = {
            name: tensor
            for file in files
            for name, tensor in read_state(file, device).items()
            if name not in CONSTANTS
        }
        if self.place.file:
            state = open_clip.convert(state)
        with torch.device("meta"):
            wanted = {
                name: tensor.shape for name, tensor in CLIPModel(self.config).state_dict().items()
            }
        layout = (
            "an open_clip state dict of that model (set model_config=)"
            if self.place.file
            else "the CLIPModel of its config.json"
        )
        check_shapes(state, wanted, f"{self.place.said} is not {layout}")
        return state


def check_shapes(state: dict[str, Tensor], wanted: dict[str, torch.Size], what: str) -> None:
    """Raise a ValueError that begins with `what` and names the first tensor that is there and not wanted, or wanted and not there so."""
    held = {name: tensor.shape for name, tensor in state.items()}
    for name in sorted(wanted | held):
        if held.get(name) != wanted.get(name):
            there, needed = (
                f"{list(shapes[name])}" if name in shapes else "nothing"
                for shapes in (held, wanted)
            )
            raise ValueError(f"{what}: {name} is {there} there, not {needed}")


def read_state(file: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a weight file by name; on the device `meta` only their shapes, unread. Nothing is unpickled. Raises ValueError."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as held:
                if device != "meta":
                    return {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 (it is no dict)
                return {
                    name: torch.empty(held.get_slice(name).get_shape(), device="meta")
                    for name in held.keys()
                }  # noqa: SIM118
        state = torch.load(
            file, weights_only=True, map_location=device, mmap=zipfile.is_zipfile(file)
        )
    except (UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{file} holds no plain tensors, and deradiff unpickles nothing else ({type(error).__name__})"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(
            f"{file} is no state dict: give a file of tensors by name, with or without a state_dict key around them"
        )
    return state


def snapshot(repo: str, patterns: list[str]) -> Path:
    """The local folder of a hub repository with the files that match. Raises ValueError where it cannot be read."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"{repo} is no local path and could not be read from the hub ({type(error).__name__})"
        ) from error


def place(checkpoint: str) -> Place:
    """Where a checkpoint lies: an `asset:`, a folder or file, else a hub id `org/name` or a file there `org/name/file.pt`. ValueError."""
    checkpoint = locate(checkpoint)
    path = Path(checkpoint)
    if path.is_dir():
        return Place(checkpoint, None, path, None)
    if path.is_file():
        if path.suffix not in FILES:
            raise ValueError(
                f"the checkpoint {checkpoint} must be a folder, or a {', '.join(FILES[:-1])} or {FILES[-1]} file"
            )
        return Place(checkpoint, None, path.parent, path.name)
    *organisation, last = checkpoint.split("/")
    file = last if path.suffix in FILES else None
    repo = "/".join(organisation if file else [*organisation, last])
    if not is_hub_id(repo):
        raise ValueError(
            f"there is no checkpoint {checkpoint}: give an existing folder or file, or a hub id such as org/name"
        )
    return Place(checkpoint, repo, snapshot(repo, ["*.json", "merges.txt"]), file)


def find(
    recipe: Recipe, checkpoint: str | None, tokenizer: str | None, model_config: str | None
) -> Checkpoint:
    """The checkpoint of a scorer (arguments as `load_scorer`), checked as far as can be without reading weights. Raises ValueError."""
    where = place(checkpoint or recipe.checkpoint)
    if model_config and not where.file:
        raise ValueError(
            f"model_config describes an open_clip state dict, but {where.said} is a folder with a config.json: leave it out"
        )
    settings = (
        None if where.file else _huggingface_config(where)
    )  # first of all, for it is the quickest to be wrong
    words, vocabulary = _tokenizer(tokenizer, where, recipe)
    if settings is None:
        settings = open_clip.clip_config(
            open_clip.read_model_config(model_config) if model_config else open_clip.VIT_H_14,
            eos_token_id=words.eos_token_id,
        )
    sizes = (
        [Path(model_config)]
        if model_config
        else []
        if where.file
        else [where.folder / "config.json"]
    )
    described = [
        where.folder / name
        for name in PROCESSOR
        if where.file is None and (where.folder / name).is_file()
    ]
    found = Checkpoint(
        where, settings, words, _processor(where, settings), (*sizes, *described, *vocabulary)
    )
    _check_vocabulary(found)
    if where.repo is None:
        found.check_weights()
    return found


def _huggingface_config(where: Place) -> CLIPConfig:
    file = where.folder / "config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    if settings.get("model_type") != "clip":
        raise ValueError(
            f"{where.said} is no CLIPModel folder: it needs a config.json of model_type clip; or name a state dict file in it"
        )
    return CLIPConfig.from_dict(settings)


def _tokenizer(tokenizer: str | None, where: Place, recipe: Recipe) -> tuple[Any, list[Path]]:
    if (
        tokenizer is None
        and where.file is None
        and any((where.folder / name).is_file() for name in TOKENIZER)
    ):
        folder = where.folder
    else:
        tokenizer = tokenizer or recipe.tokenizer
        folder = (
            Path(tokenizer)
            if Path(tokenizer).is_dir()
            else snapshot(tokenizer, ["*.json", "merges.txt"])
        )
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise ValueError(
            f"{tokenizer} holds no CLIP tokenizer: give tokenizer= a hub id, or a folder with a tokenizer.json"
        )
    return CLIPTokenizer.from_pretrained(folder), [
        folder / name for name in [*TOKENIZER, "merges.txt"] if (folder / name).is_file()
    ]


def _processor(where: Place, config: Any) -> Any:
    # the PIL one by name: the automatic choice asks for torchvision, and differs from it by up to .03 a pixel
    if where.file is None and any((where.folder / name).is_file() for name in PROCESSOR):
        return CLIPImageProcessorPil.from_pretrained(where.folder)
    side = config.vision_config.image_size
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def _check_vocabulary(found: Checkpoint) -> None:
    text, words = found.config.text_config, found.tokenizer
    if len(words) > text.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(words)} tokens and {found.place.said} knows {text.vocab_size}: give tokenizer= the folder of its own"
        )
    if text.eos_token_id not in (
        2,
        words.eos_token_id,
    ):  # 2 is how old configs say "the highest id"
        warnings.warn(
            f"the scores of {found.place.said} ignore the prompt: its text_config has eos_token_id {text.eos_token_id} and its tokenizer "
            f"{words.eos_token_id}",
            stacklevel=2,
        )
