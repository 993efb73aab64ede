"""CLIP checkpoints: located from what a user named, and checked before a weight is read.

Two layouts exist: a Hugging Face folder (config.json of model_type `clip`, weights in CLIPModel's
names) and a file that holds an open_clip state dict (HPSv2's, and open_clip's own). The second is
brought under the first's names; from there on there is one path.
"""

from __future__ import annotations

import glob
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from deradiff.assets import locate
from deradiff.hub import is_hub_error, is_hub_id, not_fetched
from deradiff.scorers import open_clip
from deradiff.scorers.published import PublishedCLIP
from deradiff.text_files import read_json

ENDINGS = (".pt", ".pth", ".bin", ".safetensors")

WEIGHT_PATTERNS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
)
"""Weights of a Hugging Face folder, in the order of preference."""

SMALL_FILES = ["*.json", "merges.txt"]
TOKENIZER_FILES = ["tokenizer.json", "vocab.json"]
"""Either is enough."""

PROCESSOR_FILES = ["preprocessor_config.json", "processor_config.json"]

CONSTANTS = (
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
    "attn_mask",
)
"""Older files carry these; transformers and open_clip make them themselves."""

OLD_EOS_TOKEN = 2
"""The end marker's id in old configs; transformers then takes the highest id of a prompt."""


@dataclass(frozen=True)
class CheckpointLocation:
    """Where a checkpoint lies.

    Attributes:
        source: as the user named it.
        repo: a hub id, where the weights are yet to come from there.
        folder: on this machine.
        file: the state dict's name; None for a Hugging Face folder.
    """

    source: str
    repo: str | None
    folder: Path
    file: str | None

    def weights(self) -> list[Path]:
        """The weight files, downloaded if they are on the hub.

        Raises:
            ValueError: where there are none.
        """
        patterns = [glob.escape(self.file)] if self.file else WEIGHT_PATTERNS
        for pattern in patterns:
            folder = snapshot(self.repo, [pattern]) if self.repo else self.folder
            files = sorted(folder.glob(pattern))
            if files:
                return files
        wanted = self.file or "model.safetensors or pytorch_model.bin"
        raise ValueError(f"the checkpoint {self.source} holds no {wanted}")

    def has_any(self, names: Sequence[str]) -> bool:
        """Whether it is a Hugging Face folder that holds one of these files."""
        return self.file is None and any((self.folder / name).is_file() for name in names)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose small files are read, and whose weights are not.

    Attributes:
        location: where it lies.
        config: a CLIPConfig.
        tokenizer: of the prompts.
        processor: of the images.
        small_files: what these were read from.
    """

    location: CheckpointLocation
    config: Any
    tokenizer: Any
    processor: Any
    small_files: tuple[Path, ...]

    def files(self) -> list[Path]:
        """All that decides what the network computes: its weights, and the small files."""
        return [*self.location.weights(), *self.small_files]

    def load(self) -> Any:
        """The network, a CLIPModel in float32, in evaluation mode.

        Raises:
            ValueError: where the weights are of another layout or size.
        """
        state = self._read_state("cpu")
        network = CLIPModel.from_pretrained(
            None, config=self.config, state_dict=state, dtype=torch.float32
        )
        return network.eval()

    def check_weights(self) -> None:
        """Compare names and shapes of the weights with the configuration.

        Raises:
            ValueError: naming the first that differs.
        """
        self._read_state("meta")

    def _read_state(self, device: str) -> dict[str, Tensor]:
        state = read_states(self.location.weights(), device)
        state = {name: tensor for name, tensor in state.items() if name not in CONSTANTS}
        layout = "the CLIPModel of its config.json"
        if self.location.file:
            state = open_clip.convert(state)
            layout = "an open_clip state dict of that model (set model_config=)"
        with torch.device("meta"):
            network = CLIPModel(self.config)
        wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
        check_shapes(state, wanted, f"{self.location.source} is not {layout}")
        return state


def check_shapes(state: dict[str, Tensor], wanted: dict[str, torch.Size], what: str) -> None:
    """Compare a state dict with the names and shapes that a network wants.

    Args:
        state: the tensors by name.
        wanted: the shapes by name.
        what: how the message begins, such as "<file> is not <a network>".

    Raises:
        ValueError: naming the first tensor that differs.
    """
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for name in sorted(wanted | shapes):
        if shapes.get(name) != wanted.get(name):
            actual = list(shapes[name]) if name in shapes else "nothing"
            expected = list(wanted[name]) if name in wanted else "nothing"
            raise ValueError(f"{what}: {name} is {actual} there, not {expected}")


def read_states(files: Sequence[Path], device: str) -> dict[str, Tensor]:
    """The tensors of several weight files together, as `read_state` reads one."""
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(read_state(file, device))
    return state


def read_state(file: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a weight file by name; on the device `meta` only their shapes.

    Nothing is unpickled.

    Raises:
        ValueError: where the file holds anything but tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return _read_safetensors(file, device)
        is_mappable = zipfile.is_zipfile(file)
        state = torch.load(file, weights_only=True, map_location=device, mmap=is_mappable)
    except (UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{file} holds no plain tensors, and deradiff unpickles nothing else "
            f"({type(error).__name__})"
        ) from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    are_tensors = isinstance(state, dict) and all(
        isinstance(value, Tensor) for value in state.values()
    )
    if not are_tensors:
        raise ValueError(
            f"{file} is no state dict: give a file of tensors by name, with or without a "
            "state_dict key around them"
        )
    return state


def _read_safetensors(file: Path, device: str) -> dict[str, Tensor]:
    state = {}
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
        for name in names:
            if device == "meta":
                shape = opened.get_slice(name).get_shape()
                state[name] = torch.empty(shape, device="meta")
            else:
                state[name] = opened.get_tensor(name)
    return state


def snapshot(repo: str, patterns: list[str], argument: str = "checkpoint") -> Path:
    """The local folder of a hub repository with the files that match.

    Args:
        repo: the hub id.
        patterns: of the files.
        argument: that a local copy may be given as.

    Raises:
        ValueError: where it cannot be read.
    """
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    # No network, no such repository, no access: the hub's client has a class for each
    except Exception as error:
        if not is_hub_error(error) and not isinstance(error, OSError):
            raise
        raise ValueError(not_fetched(f"a scorer's {argument}", repo, error, argument)) from error


def locate_checkpoint(checkpoint: str) -> CheckpointLocation:
    """Where a checkpoint lies.

    Args:
        checkpoint: an `asset:`, a folder or file, a hub id `org/name`, or a file there,
            `org/name/file.pt`.

    Raises:
        ValueError: where it is none of these.
    """
    checkpoint = locate(checkpoint)
    path = Path(checkpoint)
    if path.is_dir():
        return CheckpointLocation(checkpoint, None, path, None)
    if path.is_file():
        if path.suffix not in ENDINGS:
            raise ValueError(
                f"the checkpoint {checkpoint} must be a folder, or a {', '.join(ENDINGS[:-1])} or "
                f"{ENDINGS[-1]} file"
            )
        return CheckpointLocation(checkpoint, None, path.parent, path.name)

    *organisation, last = checkpoint.split("/")
    file = last if path.suffix in ENDINGS else None
    repo = "/".join(organisation if file else [*organisation, last])
    if not is_hub_id(repo):
        raise ValueError(
            f"there is no checkpoint {checkpoint}: give an existing folder or file, or a hub id "
            "such as org/name"
        )
    return CheckpointLocation(checkpoint, repo, snapshot(repo, SMALL_FILES), file)


def find_checkpoint(
    published: PublishedCLIP,
    checkpoint: str | None,
    tokenizer: str | None,
    model_config: str | None,
) -> Checkpoint:
    """The checkpoint of a scorer, checked as far as can be without reading weights.

    Args:
        published: where its published files are.
        checkpoint: as of `load_scorer`.
        tokenizer: as of `load_scorer`.
        model_config: as of `load_scorer`.

    Raises:
        ValueError: where something is missing or does not fit.
    """
    location = locate_checkpoint(checkpoint or published.checkpoint)
    if model_config and not location.file:
        raise ValueError(
            f"model_config describes an open_clip state dict, but {location.source} is a folder "
            "with a config.json: remove model_config"
        )

    # The config first where it lies in the folder: it is the quickest to be wrong
    config = None if location.file else _huggingface_config(location)
    tokenizer_object, vocabulary = _tokenizer(tokenizer, location, published)
    if config is None:
        sizes = open_clip.read_model_config(model_config) if model_config else open_clip.VIT_H_14
        config = open_clip.clip_config(sizes, eos_token_id=tokenizer_object.eos_token_id)

    # What the small files are, for the scorer's version
    small_files: list[Path] = []
    if model_config:
        small_files.append(Path(model_config))
    elif not location.file:
        small_files.append(location.folder / "config.json")
    if not location.file:
        processor_files = [location.folder / name for name in PROCESSOR_FILES]
        small_files += [file for file in processor_files if file.is_file()]
    small_files += vocabulary

    processor = _processor(location, config)
    result = Checkpoint(location, config, tokenizer_object, processor, tuple(small_files))
    _check_vocabulary(result)
    is_on_this_machine = location.repo is None
    if is_on_this_machine:
        result.check_weights()
    return result


def _huggingface_config(location: CheckpointLocation) -> CLIPConfig:
    file = location.folder / "config.json"
    settings = read_json(file) if file.is_file() else {}
    if settings.get("model_type") != "clip":
        raise ValueError(
            f"{location.source} is no CLIPModel folder: it needs a config.json of model_type clip; "
            "or name a state dict file in it"
        )
    return CLIPConfig.from_dict(settings)


def _tokenizer(
    tokenizer: str | None, location: CheckpointLocation, published: PublishedCLIP
) -> tuple[Any, list[Path]]:
    """The tokenizer and its files: the user's, the folder's own, or the published one."""
    if tokenizer is None and location.has_any(TOKENIZER_FILES):
        folder = location.folder
    else:
        tokenizer = tokenizer or published.tokenizer
        is_folder = Path(tokenizer).is_dir()
        folder = Path(tokenizer) if is_folder else snapshot(tokenizer, SMALL_FILES, "tokenizer")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{tokenizer} holds no CLIP tokenizer: give tokenizer= a hub id, or a folder with a "
            "tokenizer.json"
        )
    files = [folder / name for name in [*TOKENIZER_FILES, "merges.txt"]]
    return CLIPTokenizer.from_pretrained(folder), [file for file in files if file.is_file()]


def _processor(location: CheckpointLocation, config: Any) -> Any:
    """The image processor, the PIL one by name.

    The automatic choice asks for torchvision, and differs from it by up to .03 a pixel.
    """
    if location.has_any(PROCESSOR_FILES):
        return CLIPImageProcessorPil.from_pretrained(location.folder)
    side = config.vision_config.image_size
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def _check_vocabulary(checkpoint: Checkpoint) -> None:
    """Raises ValueError for a tokenizer of another network; warns where prompts are not read."""
    text = checkpoint.config.text_config
    tokenizer = checkpoint.tokenizer
    source = checkpoint.location.source
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and {source} knows {text.vocab_size}: give "
            "tokenizer= the folder of its own"
        )
    if text.eos_token_id not in (OLD_EOS_TOKEN, tokenizer.eos_token_id):
        warnings.warn(
            f"the scores of {source} ignore the prompt: its text_config has eos_token_id "
            f"{text.eos_token_id} and its tokenizer {tokenizer.eos_token_id}",
            stacklevel=2,
        )
