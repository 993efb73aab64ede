"""Aligned models as files: where an anchor lies, what its card says of it, and how it is saved.

Besides our own anchors, those of other trainers are read: a LoRA of diffusers, peft, kohya or TRL;
a network of any pipeline of diffusers in its folder, alone, at the root or in a whole pipeline; one
file with a whole network; each in a folder or on the hub.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import parse_safetensors_file_metadata
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from deradiff import hub
from deradiff.anchors.locations import CARD, PEFT_CONFIG, AnchorFiles, find_files, places_of
from deradiff.anchors.lora_files import (
    PEFT_FILE,
    PEFT_PREFIX,
    LoraWeights,
    check_config,
    read_lora,
)
from deradiff.anchors.predictions import prediction_of, prediction_of_file
from deradiff.anchors.single_files import original_family, read_network
from deradiff.anchors.weight_files import (
    SAFETENSORS,
    check_pickle_allowed,
    check_readable,
    check_values,
    is_pickle,
    is_weights,
    read_metadata,
    read_names,
)
from deradiff.digests import DIGEST, anchor_digest, sealed, sort_metadata, unsealed
from deradiff.files import write_atomic, writing
from deradiff.models.base_model import INDEX, SCHEDULER_CONFIG
from deradiff.models.families import (
    FAMILIES,
    class_names,
    family_of_config,
    family_of_index,
)
from deradiff.models.family import unwrapped
from deradiff.models.pipelines import (
    DENOISER_NAMES,
    SECOND_DENOISER_NAMES,
    denoiser_name,
    known_family,
    pipeline_label,
)

BETA_CONVENTION = "mean-half"
"""What our betas multiply: half the difference of two errors, each a mean over C, H and W."""

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_FILES = (LORA_FILE, PEFT_FILE)
PICKLED_PEFT_FILE = "adapter_model.bin"
PICKLED_LORA_FILES = ("pytorch_lora_weights.bin", PICKLED_PEFT_FILE)

NETWORK_FOLDERS = (*DENOISER_NAMES, *SECOND_DENOISER_NAMES)
"""The folders of a pipeline that may hold a denoiser; the first one that does counts."""

NETWORK_MODULES = ("diffusers.models.unets", "diffusers.models.transformers")
"""Where diffusers keeps its denoisers, so that an autoencoder's folder is told apart."""

SHARDS_INDEX = ".safetensors.index.json"
NETWORK_PICKLE = "diffusion_pytorch_model.bin"

ADAPTER_SIGNS = ("lora", "hada_", "lokr_")
"""Parts of the names of an adapter's tensors that no network's tensors have."""


CARD_TEXTS = ("base_model", "family", "method", "beta_convention", "objective", "dataset", "device")
CARD_OPTIONAL_TEXTS = ("base_revision", "vae", "git_commit", "weights_digest")
CARD_NUMBERS = ("steps", "pairs_seen", "gpu_hours", "flops")
"""Keys of a card by the type of their values."""


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
        reward: weights of the scorers that labelled its pairs, over the temperature of the labels;
            None: people did, or unknown.
        seed: of the training.
        git_commit: of the code; None: it was no checkout.
        versions: of the packages, by name.
        gpu_hours: of the whole training.
        device: that it was trained on.
        flops: of the whole training.
        weights_digest: of the weights that it lies beside (`deradiff.digests.anchor_digest`); None:
            unknown.
        calibration: what held-out pairs said of the anchor, by name (`deradiff calibrate`); None:
            it was not asked.

    Raises:
        ValueError: for values of another type, another method, and a beta that is not above 0.
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
    reward: dict[str, float] | None = None
    seed: int = 0
    git_commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    gpu_hours: float = 0.0
    device: str = ""
    flops: float = 0.0
    weights_digest: str | None = field(default=None, compare=False)
    calibration: dict[str, float] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        # A card is somebody's file: what is printed, compared and multiplied has its type.
        for key in CARD_TEXTS:
            _check_card(key, getattr(self, key), _is_line(getattr(self, key)), "a line of text")
        _check_card("base_model", self.base_model, bool(self.base_model.strip()), "a name")
        for key in CARD_OPTIONAL_TEXTS:
            value = getattr(self, key)
            _check_card(key, value, value is None or _is_line(value), "a line of text or null")
        for key in CARD_NUMBERS:
            value = getattr(self, key)
            _check_card(key, value, _is_number(value) and value >= 0, "a number of at least 0")
        _check_card("seed", self.seed, _is_number(self.seed), "a number")
        _check_card("method", self.method, self.method in ("lora", "full"), "lora or full")
        is_beta = self.beta is None or (_is_number(self.beta) and self.beta > 0)
        _check_card("beta", self.beta, is_beta, "a number above 0, or null where it is unknown")
        is_reward = self.reward is None or _maps_texts_to(self.reward, _is_number)
        _check_card("reward", self.reward, is_reward, "numbers by scorer, or null")
        is_calibration = self.calibration is None or _maps_texts_to(self.calibration, _is_number)
        _check_card("calibration", self.calibration, is_calibration, "numbers by name, or null")
        are_versions = _maps_texts_to(self.versions, _is_line)
        _check_card("versions", self.versions, are_versions, "texts by package")


def _check_card(key: str, value: Any, is_right: bool, kind: str) -> None:
    if not is_right:
        raise ValueError(f"an anchor's {key} is {kind}, not {reprlib.repr(value)}")


def _is_line(value: Any) -> bool:
    """Whether a value is text that a terminal can show: no line ends, and no escape sequences."""
    return isinstance(value, str) and value.isprintable()


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number, and of a size that a float has."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def _maps_texts_to(values: Any, is_right: Callable[[Any], bool]) -> bool:
    """Whether something is right values by text."""
    if not isinstance(values, dict):
        return False
    return all(_is_line(key) and is_right(value) for key, value in values.items())


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
        network_class: diffusers' class of a full anchor's network; None where no config names it.
        parts: the folders of all denoisers that lie there, such as `transformer_2`.
        prediction: what a full anchor's network predicts, by the scheduler beside it: `epsilon`,
            `v_prediction`, `flow_prediction` or `sample`; None: nothing says it.
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
    network_class: str | None = None
    parts: tuple[str, ...] = ()
    prediction: str | None = None
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
            self.check_weights()
            if is_weights(self.weights):
                file = self.file(self.weights)
                self._network = read_network(file, like, dtype, f"the anchor {self.source}")
            else:
                self._network = self._from_folder(like, dtype)
            check_values(self._network.state_dict(), f"the anchor {self.source}")
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
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the anchor {self.source} holds no safetensors weights that diffusers can read: "
                f"{reason}"
            ) from error
        # diffusers leaves missing weights at random values, and drops what it does not know.
        missing = report["missing_keys"]
        unexpected = report["unexpected_keys"]
        if missing:
            raise ValueError(
                f"the anchor {self.source} holds no whole {type(like).__name__}: {min(missing)} is "
                "missing"
            )
        if unexpected:
            raise ValueError(
                f"the anchor {self.source} holds {min(unexpected)}, which no layer of a "
                f"{type(like).__name__} has: give an anchor of the pipeline's architecture, "
                "without quantisation"
            )
        return network

    def lora(self, pipe: Any, denoiser: str | None = None) -> LoraWeights:
        """The weights of a LoRA anchor for the pipeline's denoiser, in peft's names.

        Args:
            pipe: any diffusers pipeline.
            denoiser: the attribute of one of several denoisers; None: the first.

        Raises:
            ValueError: for a file that is not a LoRA on that denoiser alone.
        """
        self.check_weights()
        file = self.file(self.weights)
        return read_lora(file, self.peft, pipe, f"the LoRA anchor {self.source}", denoiser)

    def check_weights(self) -> None:
        """Check the weights against the digest on the card, where both are here.

        They are read as a whole for it, once in a process: 10 GB in about 10 seconds.

        Raises:
            ValueError: where the weights are not those that the card was written for.
        """
        stated = self.card.weights_digest if self.card else None
        is_folder_of_hub = not is_weights(self.weights) and not Path(self.root).is_dir()
        if stated is None or is_folder_of_hub:
            return
        if anchor_digest(self.file(self.weights)) != stated:
            raise ValueError(
                f"the weights of the anchor {self.source} are not those that its card {CARD} was "
                "written for: fetch or copy the anchor again, or train it again; where you "
                f"changed them yourself, remove {DIGEST} and weights_digest from the card"
            )

    def part(self, denoiser: str) -> Anchor:
        """The full anchor of another denoiser, from the same place.

        Args:
            denoiser: one of `parts`.

        Raises:
            ValueError: for another one.
        """
        if denoiser not in self.parts:
            raise ValueError(
                f"the anchor {self.source} has no {denoiser}/, and the pipeline has that denoiser: "
                "give a folder with both"
            )
        parent = self.weights.rpartition("/")[0]
        weights = f"{parent}/{denoiser}".removeprefix("/")
        return replace(self, weights=weights, _network=None)

    def file(self, name: str) -> Path:
        """The path of one of its files, which is fetched if it lies on the hub."""
        if Path(self.root).is_dir():
            return Path(self.root) / name
        return hub.fetch(self.root, name, self.revision)


PLACES = ("base_model", "base_revision", "vae")
"""Keys of a card that say where something lies. It may be moved."""

AFTERWARDS = ("calibration",)
"""Keys of a card that are found out after the anchor was trained."""


def cards_digest(cards: Iterable[AnchorCard | None]) -> str | None:
    """16 hexadecimal digits that tell whether anchors' cards say the same later; None: no card.

    Args:
        cards: in any order. Where a base model lies does not count, nor what was found out later.
    """
    texts = []
    for card in cards:
        values = asdict(card) if card else {}
        stated = {key: v for key, v in values.items() if key not in (*PLACES, *AFTERWARDS)}
        texts.append(json.dumps(stated, sort_keys=True))
    if not any(text != "{}" for text in texts):
        return None
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:16]


def save_anchor(path: Path, denoiser: nn.Module, card: AnchorCard) -> None:
    """Write an anchor folder: the weights as stock diffusers loads them, then the card.

    Args:
        path: the folder.
        denoiser: the trained network. With `card.method` `lora` it holds a peft adapter named
            `default`, which is saved with its alpha; with `full` it is plain.
        card: what `anchor.json` will say.

    Raises:
        ValueError: for weights that overflowed; nothing is written.
    """
    path = Path(path)
    family = FAMILIES[card.family]
    weights = path / (family.denoiser if card.method == "full" else LORA_FILE)
    with writing(weights):
        path.mkdir(parents=True, exist_ok=True)
        if card.method == "full":
            _check_trained(denoiser.state_dict(), path)
            denoiser.save_pretrained(weights)  # type: ignore[operator]
        else:
            _save_lora(path, denoiser, card)
    write_card(path, card, weights)


def write_card(folder: Path, card: AnchorCard, weights: Path) -> None:
    """Write the card of an anchor's folder, with digests of the card and of the weights.

    Args:
        folder: of the anchor.
        card: what `anchor.json` will say.
        weights: the file or folder of the weights. The metadata in their headers is sorted, so
            that equal anchors are equal files.
    """
    for file in [weights] if weights.is_file() else weights.rglob("*.safetensors"):
        sort_metadata(file)
    values = asdict(replace(card, weights_digest=anchor_digest(weights)))
    for key in AFTERWARDS:
        if values[key] is None:
            del values[key]
    write_atomic(folder / CARD, json.dumps(sealed(values), indent=2) + "\n")


def _save_lora(path: Path, denoiser: Any, card: AnchorCard) -> None:
    family = FAMILIES[card.family]
    config = denoiser.peft_config["default"].to_dict()
    for key, value in config.items():
        if isinstance(value, set):
            config[key] = sorted(value)
    state = get_peft_model_state_dict(denoiser, adapter_name="default")
    _check_trained(state, path)
    options = {
        f"{family.denoiser}_lora_layers": state,
        f"{family.denoiser}_lora_adapter_metadata": config,
    }
    getattr(diffusers, family.pipeline).save_lora_weights(path, **options)


def _check_trained(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError for weights that `load_anchor` would refuse."""
    try:
        check_values(state, str(path))
    except ValueError as error:
        raise ValueError(
            f"the trained weights have overflowed, so {path} is not written: train under another "
            "name with a lower learning rate"
        ) from error


def load_anchor(
    source: str | Path | Anchor,
    revision: str | None = None,
    subfolder: str | None = None,
    read_pickled_tensors: bool = False,
) -> Anchor:
    """Find an anchor, and read its card. Its weights load later.

    Args:
        source: one of

            - a folder of `save_anchor`, or the directory of the train run that wrote it;
            - a folder or hub id (`org/name`) with a network of diffusers in `unet/`,
              `transformer/`, `transformer_2/`, `prior/` or `decoder/`, or at its root;
            - a folder or hub id with a LoRA of diffusers, TRL or peft;
            - a file of a LoRA or of a whole network;
            - a folder or file in a hub repository: `org/name/folder/file.safetensors`;
            - an `Anchor`, which is returned as it is.
        revision: a branch, tag or commit of the hub.
        subfolder: a folder in the source; `org/name/folder` says the same.
        read_pickled_tensors: also read `.pth`, `.pt`, `.bin` and `.ckpt`, by torch's
            `weights_only` reader, which builds tensors and runs no code of the file.

    Raises:
        ValueError: where there is no anchor, or its kind cannot be told.
    """
    if isinstance(source, Anchor):
        return source
    source = str(source)
    files = find_files(source, revision, subfolder)
    if subfolder:
        source = f"{source.rstrip('/')}/{subfolder.strip('/')}"
    card = _read_card(files, source)

    # TRL saves its LoRA beside the whole pipeline, whose UNet then has its layers wrapped: there
    # the LoRA is the anchor.
    lora_files = (*LORA_FILES, *PICKLED_LORA_FILES) if read_pickled_tensors else LORA_FILES
    has_lora_file = any(name in files.names for name in lora_files)
    if files.requested is None and not has_lora_file:
        anchor = _full_anchor(files, source, card, read_pickled_tensors)
        if anchor:
            return anchor

    weights = files.requested or _only_weights(files.names, source)
    check_pickle_allowed(weights, f"the anchor {source}", read_pickled_tensors)
    anchor = Anchor(
        source=source,
        root=files.root,
        weights=files.path_of(weights),
        method="lora",
        card=card,
        family=card.family if card else None,
        revision=revision,
    )
    if files.is_local:
        check_readable(anchor.file(anchor.weights), f"the anchor {source}")
    is_pefts = weights in (PEFT_FILE, PICKLED_PEFT_FILE)
    if weights not in (*LORA_FILES, *PICKLED_LORA_FILES):
        names, texts = _header(anchor)
        _recognise_network(anchor, names, texts)
        is_pefts = any(name.startswith(PEFT_PREFIX) for name in names)
    if is_pefts and PEFT_CONFIG in files.names:
        anchor.peft = files.read_json(PEFT_CONFIG)
        check_config(anchor.peft, f"the LoRA anchor {source}")
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
    denoiser = f"the {family} pipeline's denoiser"
    _check_network_class(anchor, [FAMILIES[family].denoiser_class], denoiser)
    return anchor


def check_anchor(source: str | Path | Anchor, pipe: Any) -> Anchor:
    """Find an anchor, and check it against a pipeline as far as its files tell. No weight is read.

    Args:
        source: as `load_anchor` takes it.
        pipe: any diffusers pipeline with a denoiser.

    Raises:
        ValueError: where there is no anchor, or one of another family, class of network or
            prediction than the pipeline's.
    """
    anchor = load_anchor(source)
    family = known_family(pipe)
    if family:
        check_anchor_family(anchor, family.name)
    denoiser = denoiser_name(pipe)
    network = unwrapped(getattr(pipe, denoiser))
    _check_network_class(
        anchor, class_names(network), f"the {pipeline_label(pipe)} pipeline's {denoiser}"
    )

    _check_prediction(anchor, getattr(pipe, "scheduler", None))
    return anchor


def _check_prediction(anchor: Anchor, scheduler: Any) -> None:
    """Raise ValueError where an anchor's network predicts something else than the pipeline's."""
    if anchor.prediction is None or scheduler is None:
        return
    config = {"_class_name": type(scheduler).__name__, **scheduler.config}
    prediction = prediction_of(config)
    if prediction not in (None, anchor.prediction):
        raise ValueError(
            f"the anchor {anchor.source} predicts {anchor.prediction} and the pipeline "
            f"{prediction}, whose outputs cannot be mixed: give an anchor and a pipeline of one "
            "prediction type"
        )


def _check_network_class(anchor: Anchor, classes: Sequence[str], denoiser: str) -> None:
    """Raise ValueError for a full anchor of another class than the pipeline's network."""
    if anchor.network_class is None or anchor.network_class in classes:
        return
    raise ValueError(
        f"the anchor {anchor.source} is a {anchor.network_class} and {denoiser} a "
        f"{classes[0]}: give an anchor of its architecture"
    )


def _read_card(files: AnchorFiles, source: str) -> AnchorCard | None:
    """The card, without keys that a later version may have added. Raises ValueError."""
    if CARD not in files.names:
        return None
    try:
        values = unsealed(files.read_json(CARD))
    except ValueError as error:
        raise ValueError(
            f"the card {source}/{CARD} cannot be used ({error}): fetch or copy it again; where you "
            f"changed it yourself, remove {DIGEST} from it"
        ) from error
    known = {card_field.name for card_field in fields(AnchorCard)}
    try:
        return AnchorCard(**{key: value for key, value in values.items() if key in known})
    except TypeError as error:
        reason = str(error).removeprefix("AnchorCard.__init__() ")
        raise ValueError(f"the card {source}/{CARD} is incomplete: {reason}") from error
    except ValueError as error:
        raise ValueError(f"the card {source}/{CARD} is no card: {error}") from error


def _full_anchor(
    files: AnchorFiles, source: str, card: AnchorCard | None, pickles_allowed: bool
) -> Anchor | None:
    """The anchor of a folder that holds a denoiser in diffusers' layout; None for other folders."""
    parts = [folder for folder in (*NETWORK_FOLDERS, "") if _holds_network(files, folder)]
    if not parts:
        return None
    folder = parts[0]
    config = files.read_json(_in_folder(folder, "config.json"))
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "an unknown method")
        raise ValueError(
            f"the anchor {source} is quantised ({method}), and mixing needs its own weights: give "
            "the anchor in bfloat16 or float16"
        )
    _check_network_files(files, folder, source)
    return Anchor(
        source=source,
        root=files.root,
        weights=files.path_of(_network_weights(files, folder, source, pickles_allowed)),
        method="full",
        card=card,
        family=card.family if card else _family_name(files, config, source),
        revision=files.revision,
        variant=_variant(files.names, folder),
        network_class=config["_class_name"],
        parts=tuple(part for part in parts if part),
        prediction=_prediction(files),
    )


def _in_folder(folder: str, name: str) -> str:
    """The path of a file in a folder; an empty folder is the one that all paths are in."""
    return f"{folder}/{name}".removeprefix("/")


def _holds_network(files: AnchorFiles, folder: str) -> bool:
    """Whether a folder has the config of a denoiser.

    At the root it may be any model's. There, of diffusers' classes only denoisers count.
    """
    config_name = _in_folder(folder, "config.json")
    if config_name not in files.names:
        return False
    class_name = files.read_json(config_name).get("_class_name")
    if not isinstance(class_name, str):
        return False
    known_class = getattr(diffusers, class_name, None)
    return bool(folder) or known_class is None or known_class.__module__.startswith(NETWORK_MODULES)


def _family_name(files: AnchorFiles, config: dict[str, Any], source: str) -> str | None:
    """The family of a network in diffusers' layout; None for one of no known family.

    The pipeline's index tells families apart whose denoisers have one class.
    """
    family = family_of_config(config)
    if family is None or INDEX not in files.names:
        return family.name if family else None
    try:
        return family_of_index(files.read_json(INDEX), source).name
    except ValueError:
        return None


def _prediction(files: AnchorFiles) -> str | None:
    """What the networks of a pipeline predict, by its scheduler; None: there is none."""
    if SCHEDULER_CONFIG in files.names:
        return prediction_of(files.read_json(SCHEDULER_CONFIG))
    if INDEX in files.parents_names and SCHEDULER_CONFIG in files.parents_names:
        return prediction_of(files.read_parents_json(SCHEDULER_CONFIG))
    return None


def _check_network_files(files: AnchorFiles, folder: str, source: str) -> None:
    """Raise ValueError for a torn file among the local weights of a network."""
    if not files.is_local:
        return
    for name in files.names:
        if name.rpartition("/")[0] != folder:
            continue
        if name.endswith(SAFETENSORS):
            check_readable(Path(files.root) / files.path_of(name), f"the anchor {source}")
        elif name.endswith(SHARDS_INDEX):
            files.read_json(name)


def _network_weights(files: AnchorFiles, folder: str, source: str, pickles_allowed: bool) -> str:
    """The folder of a network, or the pickle in it where it holds no safetensors."""
    ours = [name for name in files.names if name.rpartition("/")[0] == folder]
    pickles = [name for name in ours if is_pickle(name)]
    if not pickles or any(SAFETENSORS in name for name in ours):
        return folder
    usual = _in_folder(folder, NETWORK_PICKLE)
    weights = usual if usual in pickles else pickles[0]
    check_pickle_allowed(weights, f"the anchor {source}", pickles_allowed)
    if usual not in pickles and len(pickles) > 1:
        raise ValueError(
            f"the anchor {source} is a network in several pickles ({', '.join(sorted(pickles))}): "
            "save it as safetensors"
        )
    return weights


def _variant(names: Sequence[str], folder: str) -> str | None:
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


def _only_weights(names: Sequence[str], source: str) -> str:
    """The LoRA file of a folder by its usual name, or the only file of weights. Raises ValueError.

    The folder is not one of diffusers' denoisers.
    """
    weights = [name for name in names if is_weights(name) and "/" not in name]
    files = [name for name in weights if name.endswith(SAFETENSORS)] or weights
    for name in (*LORA_FILES, *PICKLED_LORA_FILES):
        if name in files:
            return name
    if len(files) == 1:
        return files[0]
    if files:
        content = f"several files ({', '.join(sorted(files))}): add the file's name to the anchor"
    else:
        folders = "/, ".join(DENOISER_NAMES)
        content = f"neither a network ({folders}/) nor a LoRA file{places_of(names)}"
    raise ValueError(f"{source} is no anchor that deradiff can read: it holds {content}")


def _recognise_network(anchor: Anchor, names: Sequence[str], texts: dict[str, str]) -> None:
    """Note that an anchor's file is a whole network, where the names of its tensors say so.

    Args:
        anchor: the anchor.
        names: of the tensors in its file.
        texts: in the file's header.
    """
    for name in names:
        if any(sign in name for sign in ADAPTER_SIGNS):
            return
    family = original_family(names)
    anchor.method = "full"
    anchor.family = family.name if family else None
    anchor.prediction = prediction_of_file(names, texts)


def _header(anchor: Anchor) -> tuple[list[str], dict[str, str]]:
    """The names of the tensors in an anchor's file, and the texts in its header.

    Of a safetensors file on the hub only the header is read. Raises ValueError.
    """
    if Path(anchor.root).is_dir() or is_pickle(anchor.weights):
        file = anchor.file(anchor.weights)
        return read_names(file, f"the anchor {anchor.source}"), read_metadata(file)
    try:
        header = parse_safetensors_file_metadata(
            anchor.root, anchor.weights, revision=anchor.revision
        )
    # No such file, no network, or a file of something else: each has an error of its own.
    except Exception as error:
        raise ValueError(
            f"{anchor.source} is no safetensors file that can be read ({type(error).__name__})"
        ) from error
    return list(header.tensors), dict(header.metadata)
