"""One lambda as plain weights, for programs that know nothing of deradiff.

It is mode `weights` of `realign`, written once: sampling then costs what one model costs. A LoRA
anchor becomes a LoRA whose strength 1 is that lambda; a full anchor becomes a whole denoiser,
theta_ref + lam (theta_anchor - theta_ref).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deradiff.anchors.anchor import (
    LORA_FILE,
    Anchor,
    AnchorCard,
    check_anchor_family,
    load_anchor,
    write_card,
)
from deradiff.anchors.model_card import README
from deradiff.digests import anchor_digest, sealed, unsealed
from deradiff.files import remove_parts, write_atomic, writing
from deradiff.locks import is_running
from deradiff.method.lambdas import validated
from deradiff.models.base_model import BaseModel
from deradiff.models.families import FAMILIES, family_of
from deradiff.models.family import Family
from deradiff.realignment.adapters import Adapter
from deradiff.realignment.full_anchor import FullAnchor
from deradiff.text_files import read_json
from deradiff.texts import in_markdown

log = logging.getLogger(__name__)

NOTE = "bake.json"


def bake(
    anchor: str | Path | Anchor,
    lam: float,
    path: str | Path,
    base: str | None = None,
    base_revision: str | None = None,
) -> Path:
    """Write what mode `weights` samples from at one lambda, as a folder of its own.

    The folder holds:

    - of a LoRA, `pytorch_lora_weights.safetensors` with lam and alpha multiplied into it: in
      kohya's names for SD1.5 and SDXL, in diffusers' names for SD3 and FLUX;
    - of a full anchor, `unet/` or `transformer/` as diffusers saves it, in float32;
    - `anchor.json` with beta / lam as its beta, so that the folder is an anchor itself;
    - `bake.json`: what it was made from;
    - `README.md`: how to load it.

    It appears whole or not at all. The same call again leaves it as it is; where its weights are no
    longer what was written, they are named in the log and made again.

    Args:
        anchor: as `load_anchor` takes it.
        lam: a number above 0.
        path: the folder to write.
        base: the pipeline that the anchor was aligned from; None: the one that its card names.
        base_revision: its branch, tag or commit on the hub, if `base` is given.

    Returns:
        The folder.

    Raises:
        ValueError: for another kind of lam, for a folder that holds something else, for an anchor
            without a card where `base` is not given, and for an anchor whose multiple is no plain
            weights (DoRA).
    """
    path = Path(path)
    anchor = load_anchor(anchor)
    if not anchor.root:
        raise ValueError(
            f"the anchor {anchor.source} has no files that a bake could name: save it, and give "
            "its folder"
        )
    lam = _checked_lam(lam)
    model = _base_model(anchor, base, base_revision)
    family = model.family
    check_anchor_family(anchor, family.name)
    origin = {
        "anchor": anchor.source,
        "anchor_sha256": anchor_digest(Path(anchor.root) / anchor.weights),
        "lam": lam,
        "base_model": model.source,
        "base_revision": model.revision,
        "family": family.name,
        "method": anchor.method,
    }
    if _holds_bake(path, origin):
        return path

    # The folder is written aside and renamed when it is complete.
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    for left in path.parent.glob(f".{path.name}.*.part"):
        if not _is_running(left):
            shutil.rmtree(left)
    try:
        aside.mkdir(parents=True)
        pipe = _load_denoiser_alone(model)
        if anchor.method == "lora":
            _bake_lora(pipe, anchor, lam, aside)
        else:
            _bake_full(pipe, anchor, lam, aside)
        card = _baked_card(anchor, lam, model)
        write_card(aside, card, aside / _weights_name(anchor, family))
        write_note(aside, origin | {"beta_target": card.beta})
        if path.exists():
            shutil.rmtree(path)  # empty, or damaged
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def write_note(path: Path, note: dict[str, Any]) -> None:
    """Write `bake.json`, and the README.md that says the same in words.

    Args:
        path: the folder of the bake.
        note: what it was made from, and under `compared`, where it was measured, how far the baked
            images are from mode exact.
    """
    write_atomic(path / NOTE, json.dumps(sealed(note), indent=2) + "\n")
    write_atomic(path / README, _readme(note))


def _checked_lam(lam: Any) -> float:
    value = validated(lam)
    if isinstance(value, Tensor) or callable(value) or not value > 0:
        raise ValueError(f"a bake has one lam, a number above 0, not {lam!r}")
    return float(value)


def _base_model(anchor: Anchor, base: str | None, revision: str | None) -> BaseModel:
    """The given base model, or the one that the anchor's card names. Raises ValueError."""
    if base is not None:
        return BaseModel(base, revision)
    if anchor.card is None:
        raise ValueError(
            f"{anchor.source} has no card to name its base: give base=<pipeline folder or hub id>"
        )
    return BaseModel(anchor.card.base_model, anchor.card.base_revision)


def read_note(path: Path) -> dict[str, Any]:
    """The content of `bake.json`; empty where there is none, or none that can be read.

    Args:
        path: the folder of the bake.
    """
    try:
        return unsealed(read_json(path / NOTE))
    except (FileNotFoundError, ValueError):
        return {}


def _holds_bake(path: Path, origin: dict[str, Any]) -> bool:
    """Whether the folder holds this very bake. Raises ValueError where it holds anything else."""
    is_empty_folder = path.is_dir() and not any(path.iterdir())
    if not path.exists() or is_empty_folder:
        return False
    note = read_note(path)
    for key, value in origin.items():
        if note.get(key) != value:
            raise ValueError(
                f"{path} is there already and holds something else than this bake: give another "
                "folder, or remove that one"
            )
    try:
        load_anchor(path).check_weights()
    except ValueError as error:
        log.warning("%s, and is baked again", error)
        return False
    remove_parts(path)
    return True


def _is_running(part: Path) -> bool:
    """Whether the process that writes a folder aside runs, as far as this machine knows."""
    process = part.name.removesuffix(".part").rpartition(".")[2]
    return not process.isdecimal() or is_running(int(process))


def _weights_name(anchor: Anchor, family: Family) -> str:
    """The file or folder of a bake's weights."""
    return LORA_FILE if anchor.method == "lora" else family.denoiser


def _load_denoiser_alone(model: BaseModel) -> Any:
    """The base's pipeline without text encoders and autoencoder, whose weights are not needed."""
    needed = (model.family.denoiser, "scheduler")
    model.check(needed)
    parts: dict[str, Any] = {}
    for name, value in model.index.items():
        if isinstance(value, list) and name not in needed:
            parts[name] = None
    return model.load_pipeline(torch.float32, parts)


def _bake_lora(pipe: Any, anchor: Anchor, lam: float, folder: Path) -> None:
    """Write a LoRA with lam and its own scale multiplied into its B."""
    family = family_of(pipe)
    adapter = Adapter(pipe, anchor, 0, family.denoiser)
    if adapter.is_variant:
        raise ValueError(
            f"{anchor.source} is a DoRA, and lam times one is no LoRA: sample it with "
            "mode='weights' instead"
        )
    state: dict[str, Tensor] = {}
    for path, layer in adapter.layers.items():
        down = layer.lora_A[adapter.name]
        up = layer.lora_B[adapter.name]
        if up.bias is not None:
            raise ValueError(
                f"{anchor.source} has biases in its LoRA layers, which other programs do not read: "
                "use mode='weights'"
            )
        scale = lam * layer.scaling[adapter.name]
        scaled = (scale * up.weight.detach().float()).to(up.weight.dtype)
        state |= _named(path, family, down.weight.detach().contiguous(), scaled.contiguous())
    with writing(folder / LORA_FILE):
        save_file(state, folder / LORA_FILE, metadata={"format": "pt"})


def _named(layer: str, family: Family, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """A layer's matrices under the names that ComfyUI, A1111 and diffusers all read.

    Alpha is the rank, so that strength 1 is the lambda.

    Args:
        layer: its path in the network.
        family: of the pipeline.
        down: A, (rank, in, ...).
        up: B, (out, rank, ...).
    """
    if family.lora_format == "diffusers":
        key = f"{family.denoiser}.{layer}"
        return {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    key = f"lora_unet_{layer.replace('.', '_')}"
    return {
        f"{key}.lora_down.weight": down,
        f"{key}.lora_up.weight": up,
        f"{key}.alpha": torch.tensor(float(len(down))),
    }


def _bake_full(pipe: Any, anchor: Anchor, lam: float, folder: Path) -> None:
    """Write the weighted sum of the reference's and the anchor's weights."""
    family = family_of(pipe)
    denoiser = getattr(pipe, family.denoiser)
    theirs = FullAnchor(denoiser, anchor, family.name).weights()
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            # In the order of mode weights, which rounds alike.
            parameter.copy_((1 - lam) * parameter + lam * theirs[name])
    with writing(folder / family.denoiser):
        denoiser.save_pretrained(folder / family.denoiser)


def _baked_card(anchor: Anchor, lam: float, model: BaseModel) -> AnchorCard:
    """The anchor's card at beta / lam.

    Its objective says that nobody trained this: it is no target to compare others with.
    """
    card = anchor.card
    if card is None:
        card = AnchorCard(
            base_model=model.source,
            family=model.family.name,
            method=anchor.method,
            beta=None,
            objective="unknown",
        )
    return replace(
        card,
        base_model=model.source,
        base_revision=model.revision,
        beta=card.beta / lam if card.beta else None,
        objective=f"{card.objective}, baked at lam {lam:g}",
    )


def _readme(note: dict[str, Any]) -> str:
    """The text of README.md."""
    target = ""
    if note["beta_target"]:
        target = f", which stands for beta {note['beta_target']:g}"
    lines = [
        f"# {in_markdown(note['anchor'])} at lambda {note['lam']:g}{target}",
        "",
        f"Written by deradiff for {in_markdown(note['base_model'])}: its mode `weights`, the first "
        "order of the realigned chain.",
        "",
    ]
    family = FAMILIES[note["family"]]
    if note["method"] == "lora":
        lines += _loading_a_lora(family)
    else:
        lines += _loading_a_network(family)
    if note.get("compared"):
        lines += _comparison(note["compared"])
    return "\n".join(lines) + "\n"


def _comparison(compared: dict[str, Any]) -> list[str]:
    """How far the baked images are from mode exact."""
    baked = _interval(compared["rms_from_exact"])
    percent = _interval(compared["percent_of_distance"])
    distance = _interval(compared["rms_reference_anchor"])
    return [
        "",
        "## How far from mode exact",
        "",
        f"{compared['prompts']} prompts x {compared['seeds']} seeds ({compared['settings']}), same "
        "noise, RMS over pixels of 0..255:",
        f"baked to exact {baked}, reference to anchor {distance}; baked to exact is {percent} % of "
        "that",
        "(95 %, paired bootstrap over prompts).",
    ]


def _loading_a_lora(family: Family) -> list[str]:
    lines = [
        "- diffusers: `pipe.load_lora_weights(<this folder>)`",
        "- ComfyUI: put the .safetensors file into models/loras, under a name of your own, and "
        "load it with strength 1.",
    ]
    if family.lora_format == "kohya":
        lines.append("- A1111: put it into models/Lora, and write <lora:name:1> into the prompt.")
    return lines


def _loading_a_network(family: Family) -> list[str]:
    denoiser = family.denoiser
    file = f"{denoiser}/diffusion_pytorch_model.safetensors"
    lines = [
        f"- diffusers: `<Pipeline>.from_pretrained(<base>, {denoiser}=<the network's class>."
        f"from_pretrained(<this folder>, subfolder='{denoiser}'))`",
        f"- ComfyUI: put {file} into models/diffusion_models and load it with Load Diffusion "
        "Model, which reads diffusers' names.",
    ]
    if not family.flow:
        lines.append(
            "- A1111 reads single checkpoints alone: put the folder in place of the base "
            "pipeline’s own, and convert that with diffusers' "
            "scripts/convert_diffusers_to_original_*.py."
        )
    return lines


def _interval(values: list[float]) -> str:
    """A value with its interval: `1.2 [1.1, 1.3]`."""
    value, low, high = values
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"
