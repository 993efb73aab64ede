"""One lambda as plain weights: mode `weights` written once, for programs that do not know deradiff.

A LoRA anchor becomes a LoRA whose strength 1 is that lambda. A full anchor becomes a whole
denoiser, theta_ref + lam (theta_anchor - theta_ref). Sampling from either costs one model.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deradiff.anchors.anchor import (
    CARD,
    LORA_FILE,
    Anchor,
    AnchorCard,
    check_anchor_family,
    load_anchor,
)
from deradiff.files import anchor_digest, write_atomic
from deradiff.method.lambdas import validated
from deradiff.models.base_model import BaseModel
from deradiff.models.families import FAMILIES, family_of
from deradiff.models.family import Family
from deradiff.realignment.adapters import Adapter
from deradiff.realignment.networks import FullAnchor, base_parameters

NOTE = "bake.json"
README = "README.md"


def bake(
    anchor: str | Path | Anchor,
    lam: float,
    path: str | Path,
    base: str | None = None,
    base_revision: str | None = None,
) -> Path:
    """Write what mode `weights` samples from at one lambda as a folder of its own.

    A LoRA becomes `pytorch_lora_weights.safetensors`, with lam and alpha multiplied into it: in
    kohya's names for SD1.5 and SDXL, in diffusers' for SD3 and FLUX. A full anchor becomes `unet/`
    or `transformer/` as diffusers saves it, in float32. Beside it lie `anchor.json`, with
    beta / lam as its beta, so that the folder is an anchor itself; `bake.json`, what it was made
    from; and README.md, how to load it.

    The folder appears whole or not at all. The same bake again is left as it is.

    Args:
        anchor: what `load_anchor` takes.
        lam: a number above 0.
        path: the folder to write.
        base: the pipeline that the anchor was aligned from; None: the one that its card names.
        base_revision: of `base`.

    Returns:
        The folder.

    Raises:
        ValueError: in one sentence, for a lam that is no number above 0, a folder that holds
            something else, and an anchor whose multiple is no plain weights (DoRA).
    """
    anchor = load_anchor(anchor)
    path = Path(path)
    if isinstance(validated(lam), Tensor) or callable(lam) or not lam > 0:
        raise ValueError(f"a bake has one lam, a number above 0, not {lam!r}")
    lam = float(lam)
    base_model = _base_of(anchor, base, base_revision)
    family = base_model.family
    check_anchor_family(anchor, family.name)
    note = {
        "anchor": anchor.source,
        "anchor_sha256": anchor_digest(Path(anchor.root) / anchor.weights),
        "lam": lam,
        "base_model": base_model.source,
        "base_revision": base_model.revision,
        "family": family.name,
        "method": anchor.method,
    }
    if _is_there(path, note):
        return path

    # Written aside, so that the folder appears whole
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        pipe = _denoiser_alone(base_model)
        if anchor.method == "lora":
            _bake_lora(pipe, anchor, lam, aside)
        else:
            _bake_full(pipe, anchor, lam, aside)
        card = _card(anchor, lam, base_model)
        write_atomic(aside / CARD, json.dumps(asdict(card), indent=2) + "\n")
        write_note(aside, note | {"beta_target": card.beta})
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def _base_of(anchor: Anchor, base: str | None, revision: str | None) -> BaseModel:
    """The base model that was given, or the one that the anchor's card names."""
    if base is not None:
        return BaseModel(base, revision)
    if anchor.card is None:
        raise ValueError(
            f"{anchor.source} has no card to name its base: give base=<pipeline folder or hub id>"
        )
    return BaseModel(anchor.card.base_model, anchor.card.base_revision)


def write_note(path: Path, note: dict[str, Any]) -> None:
    """Write `bake.json`, and what it says in README.md.

    Args:
        path: the baked folder.
        note: what it was made from; its `compared`, where there is one, says how far the baked
            images are from mode exact.
    """
    write_atomic(path / NOTE, json.dumps(note, indent=2) + "\n")
    write_atomic(path / README, _readme(note))


def _is_there(path: Path, note: dict[str, Any]) -> bool:
    """Whether the folder holds this very bake. Raises ValueError where it holds anything else."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    file = path / NOTE
    there = json.loads(file.read_text()) if file.is_file() else {}
    if any(there.get(key) != value for key, value in note.items()):
        raise ValueError(
            f"{path} is there already and holds something else than this bake: give another "
            "folder, or remove that one"
        )
    return True


def _denoiser_alone(base: BaseModel) -> Any:
    """The base's pipeline without text encoders and autoencoder: only their names are needed."""
    needed = (base.family.denoiser, "scheduler")
    unneeded: dict[str, Any] = {}
    for name, value in base.index.items():
        if isinstance(value, list) and name not in needed:
            unneeded[name] = None
    return base.load_pipeline(torch.float32, unneeded)


def _bake_lora(pipe: Any, anchor: Anchor, lam: float, folder: Path) -> None:
    """Write the LoRA with lam and alpha multiplied into B."""
    family = family_of(pipe)
    adapter = Adapter(pipe, anchor, 0)
    if adapter.is_variant:
        raise ValueError(
            f"{anchor.source} is a DoRA, and lam times one is no LoRA: sample it with "
            "mode='weights' instead"
        )
    state: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        down = layer.lora_A[adapter.name]
        up = layer.lora_B[adapter.name]
        if up.bias is not None:
            raise ValueError(
                f"{anchor.source} has biases in its LoRA layers, which other programs do not read: "
                "use mode='weights'"
            )
        scale = lam * layer.scaling[adapter.name]
        scaled_up = (scale * up.weight.detach().float()).to(up.weight.dtype).contiguous()
        state |= _named_matrices(name, family, down.weight.detach().contiguous(), scaled_up)
    save_file(state, folder / LORA_FILE, metadata={"format": "pt"})


def _named_matrices(layer: str, family: Family, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """A layer's matrices under the names that ComfyUI, A1111 and diffusers all read.

    alpha = rank, so that strength 1 is the lambda.
    """
    if family.lora_format == "kohya":
        key = f"lora_unet_{layer.replace('.', '_')}"
        alpha = torch.tensor(float(len(down)))
        return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}
    key = f"{family.denoiser}.{layer}"
    return {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}


def _bake_full(pipe: Any, anchor: Anchor, lam: float, folder: Path) -> None:
    """Write the whole denoiser, its weights summed as mode `weights` sums them."""
    family = family_of(pipe)
    denoiser = getattr(pipe, family.denoiser)
    full = FullAnchor(denoiser, anchor, family.name)
    theirs = dict(full.network(denoiser.device, denoiser.dtype).named_parameters())
    with torch.no_grad():
        for name, parameter in base_parameters(denoiser).items():
            parameter.copy_((1 - lam) * parameter + lam * theirs[name])
    denoiser.save_pretrained(folder / family.denoiser)


def _card(anchor: Anchor, lam: float, base: BaseModel) -> AnchorCard:
    """The anchor's card at beta / lam.

    Its objective says that nobody trained this: it is no target to compare others with.
    """
    card = anchor.card
    if card is None:
        card = AnchorCard(
            base_model=base.source,
            family=base.family.name,
            method=anchor.method,
            beta=None,
            objective="unknown",
        )
    return replace(
        card,
        base_model=base.source,
        base_revision=base.revision,
        beta=card.beta / lam if card.beta else None,
        objective=f"{card.objective}, baked at lam {lam:g}",
    )


def _readme(note: dict[str, Any]) -> str:
    """What README.md says of a baked folder."""
    target = ""
    if note["beta_target"]:
        target = f", which stands for beta {note['beta_target']:g}"
    lines = [
        f"# {note['anchor']} at lambda {note['lam']:g}{target}",
        "",
        f"Written by deradiff for {note['base_model']}: its mode `weights`, the first order of the "
        "realigned chain.",
        "",
    ]
    family = FAMILIES[note["family"]]
    lines += _loading_a_lora(family) if note["method"] == "lora" else _loading_a_network(family)
    if "compared" in note:
        lines += _comparison(note["compared"])
    return "\n".join(lines) + "\n"


def _comparison(compared: dict[str, Any]) -> list[str]:
    """How far the baked images are from mode exact, for README.md."""
    from_exact = _interval(compared["rms_from_exact"])
    distance = _interval(compared["rms_reference_anchor"])
    percent = _interval(compared["percent_of_distance"])
    return [
        "",
        "## How far from mode exact",
        "",
        f"{compared['prompts']} prompts x {compared['seeds']} seeds ({compared['settings']}), same "
        "noise, RMS over pixels of 0..255:",
        f"baked to exact {from_exact}, reference to anchor {distance}; baked to exact is "
        f"{percent} % of that",
        "(95 %, paired bootstrap over prompts).",
    ]


def _loading_a_lora(family: Family) -> list[str]:
    lines = [
        "- diffusers: `pipe.load_lora_weights(<this folder>)`",
        "- ComfyUI: put the .safetensors file into models/loras, under a name of your own, and load "
        "it with strength 1.",
    ]
    if family.lora_format == "kohya":
        lines.append("- A1111: put it into models/Lora, and write <lora:name:1> into the prompt.")
    return lines


def _loading_a_network(family: Family) -> list[str]:
    denoiser = family.denoiser
    file = f"{denoiser}/diffusion_pytorch_model.safetensors"
    lines = [
        f"- diffusers: `<Pipeline>.from_pretrained(<base>, {denoiser}=<the network's class>"
        f".from_pretrained(<this folder>, subfolder='{denoiser}'))`",
        f"- ComfyUI: put {file} into models/diffusion_models and load it with Load Diffusion Model, "
        "which reads diffusers' names.",
    ]
    if family.lora_format == "kohya":
        lines.append(
            "- A1111 reads single checkpoints alone: put the folder in place of the base pipeline’s "
            "own, and convert that with diffusers' scripts/convert_diffusers_to_original_*.py."
        )
    return lines


def _interval(values: list[float]) -> str:
    return f"{values[0]:.3g} [{values[1]:.3g}, {values[2]:.3g}]"
