"""One lambda as plain weights: mode `weights` written once, for programs that know nothing of deradiff, at the cost of one model.

A LoRA anchor becomes a LoRA whose strength 1 is that lambda; a full one a whole denoiser, theta_ref + lam (theta_anchor - theta_ref).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deradiff.anchors.anchor import (
    CARD,
    LORA_FILE,
    Anchor,
    AnchorCard,
    check_anchor_family,
    load_anchor,
)
from deradiff.files import anchor_digest, locate, write_atomic
from deradiff.method.lambdas import validated
from deradiff.models.base_model import BaseModel
from deradiff.models.families import family_of
from deradiff.models.family import Family
from deradiff.realignment.adapters import Adapter
from deradiff.realignment.networks import FullAnchor, base_parameters

NOTE, README = "bake.json", "README.md"


def bake(
    anchor: str | Path | Anchor,
    lam: float,
    path: str | Path,
    base: str | None = None,
    base_revision: str | None = None,
) -> Path:
    """Write what mode `weights` samples from at `lam` as a folder of its own, and return it.

    anchor: what `load_anchor` takes. base: the pipeline it was aligned from; None takes the one that its card names.
    A LoRA is `pytorch_lora_weights.safetensors` with lam and alpha multiplied into it: in kohya's names for SD1.5 and SDXL, in diffusers'
    for SD3 and FLUX. A full anchor is `unet/` or `transformer/` as diffusers saves it, in float32. Beside it `anchor.json`, with
    beta / lam as its beta, so that the folder is an anchor itself; `bake.json`, what it was made from; and README.md, how to load it.

    The folder appears whole or not at all; the same again is left as it is. Raises ValueError, in one sentence, for a lam that is no
    number above 0, a folder that holds something else, and an anchor whose lam times is no plain weights (DoRA).
    """
    anchor, path = load_anchor(anchor), Path(path)
    if isinstance(validated(lam), Tensor) or callable(lam) or not lam > 0:
        raise ValueError(f"a bake has one lam, a number above 0, not {lam!r}")
    if base is None and anchor.card is None:
        raise ValueError(
            f"{anchor.source} has no card to name its base: give base=<pipeline folder or hub id>"
        )
    if base is None:
        base, base_revision = anchor.card.base_model, anchor.card.base_revision  # type: ignore[union-attr]
    family = BaseModel(base, base_revision).family
    check_anchor_family(anchor, family.name)
    made_from = {
        "anchor": anchor.source,
        "anchor_sha256": anchor_digest(Path(anchor.root) / anchor.weights),
        "lam": float(lam),
        "base_model": base,
        "base_revision": base_revision,
        "family": family.name,
        "method": anchor.method,
    }
    if _is_there(path, made_from):
        return path
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        pipe = _denoiser_alone(base, base_revision, family)
        (_bake_lora if anchor.method == "lora" else _bake_full)(pipe, anchor, float(lam), aside)
        card = _card(anchor, float(lam), base, base_revision, family)
        write_atomic(aside / CARD, json.dumps(asdict(card), indent=2) + "\n")
        write_note(aside, made_from | {"beta_target": card.beta})
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def write_note(path: Path, note: dict[str, Any]) -> None:
    """`bake.json`, and what it says in README.md; `compared`: how far the baked images are from mode exact."""
    write_atomic(path / NOTE, json.dumps(note, indent=2) + "\n")
    write_atomic(path / README, _readme(note))


def _is_there(path: Path, made_from: dict[str, Any]) -> bool:
    """Whether the folder holds this very bake. Raises ValueError where it holds anything else."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    note = json.loads((path / NOTE).read_text()) if (path / NOTE).is_file() else {}
    if any(note.get(key) != value for key, value in made_from.items()):
        raise ValueError(
            f"{path} is there already and holds something else than this bake: give another folder, or remove that one"
        )
    return True


def _denoiser_alone(base: str, revision: str | None, family: Family) -> Any:
    """The base's pipeline without its text encoders and autoencoder: baking needs their names, not their gigabytes."""
    import diffusers

    index = BaseModel(base, revision).index
    unneeded = [
        name
        for name, value in index.items()
        if isinstance(value, list) and name not in (family.denoiser, "scheduler")
    ]
    options: dict[str, Any] = dict.fromkeys(unneeded)
    return getattr(diffusers, family.pipeline).from_pretrained(
        locate(base), revision=revision, dtype=torch.float32, **options
    )


def _bake_lora(pipe: Any, anchor: Anchor, lam: float, folder: Path) -> None:
    from safetensors.torch import save_file

    adapter, family = Adapter(pipe, anchor, 0), family_of(pipe)
    if adapter.is_variant:
        raise ValueError(
            f"{anchor.source} is a DoRA, and lam times one is no LoRA: sample it with mode='weights' instead"
        )
    state: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        down, up = layer.lora_A[adapter.name], layer.lora_B[adapter.name]
        if up.bias is not None:
            raise ValueError(
                f"{anchor.source} has biases in its LoRA layers, which other programs do not read: use mode='weights'"
            )
        strength = lam * layer.scaling[adapter.name]
        scaled = (strength * up.weight.detach().float()).to(up.weight.dtype).contiguous()
        state |= _named(name, family, down.weight.detach().contiguous(), scaled)
    save_file(state, folder / LORA_FILE, metadata={"format": "pt"})


def _named(layer: str, family: Family, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """A layer's matrices under the names that ComfyUI, A1111 and diffusers all read; alpha = rank, so that strength 1 is the lambda."""
    if family.flow:
        return {
            f"transformer.{layer}.lora_A.weight": down,
            f"transformer.{layer}.lora_B.weight": up,
        }
    key = f"lora_unet_{layer.replace('.', '_')}"
    return {
        f"{key}.lora_down.weight": down,
        f"{key}.lora_up.weight": up,
        f"{key}.alpha": torch.tensor(float(len(down))),
    }


def _bake_full(pipe: Any, anchor: Anchor, lam: float, folder: Path) -> None:
    family = family_of(pipe)
    denoiser = getattr(pipe, family.denoiser)
    theirs = dict(
        FullAnchor(denoiser, anchor, family.name)
        .network(denoiser.device, denoiser.dtype)
        .named_parameters()
    )
    with torch.no_grad():
        for name, parameter in base_parameters(denoiser).items():
            parameter.copy_((1 - lam) * parameter + lam * theirs[name])  # as mode weights sums them
    denoiser.save_pretrained(folder / family.denoiser)


def _card(
    anchor: Anchor, lam: float, base: str, revision: str | None, family: Family
) -> AnchorCard:
    """The anchor's card at beta / lam. Its objective says that nobody trained this: it is no target to hold others against."""
    card = anchor.card or AnchorCard(
        base_model=base, family=family.name, method=anchor.method, beta=None, objective="unknown"
    )
    return replace(
        card,
        base_model=base,
        base_revision=revision,
        beta=card.beta / lam if card.beta else None,
        objective=f"{card.objective}, baked at lam {lam:g}",
    )


def _readme(note: dict[str, Any]) -> str:
    flow, lora = note["family"] in ("sd3", "flux"), note["method"] == "lora"
    denoiser = "transformer" if flow else "unet"
    target = f", which stands for beta {note['beta_target']:g}" if note["beta_target"] else ""
    lines = [
        f"# {note['anchor']} at lambda {note['lam']:g}{target}",
        "",
        f"Written by deradiff for {note['base_model']}: its mode `weights`, the first order of the realigned chain.",
        "",
        *_how_to_load(lora, flow, denoiser),
    ]
    if compared := note.get("compared"):
        rms, share, apart = (
            compared[key]
            for key in ("rms_from_exact", "percent_of_distance", "rms_reference_anchor")
        )
        lines += [
            "",
            "## How far from mode exact",
            "",
            f"{compared['prompts']} prompts x {compared['seeds']} seeds ({compared['settings']}), same noise, RMS over pixels of 0..255:",
            f"baked to exact {_interval(rms)}, reference to anchor {_interval(apart)}; baked to exact is {_interval(share)} % of that",
            "(95 %, paired bootstrap over prompts).",
        ]
    return "\n".join(lines) + "\n"


def _how_to_load(lora: bool, flow: bool, denoiser: str) -> list[str]:
    if lora:
        others = "ComfyUI: put the .safetensors file into models/loras, under a name of your own, and load it with strength 1."
        a1111 = (
            []
            if flow
            else ["A1111: put it into models/Lora, and write <lora:name:1> into the prompt."]
        )
        return [
            "- diffusers: `pipe.load_lora_weights(<this folder>)`",
            f"- {others}",
            *(f"- {line}" for line in a1111),
        ]
    file = f"{denoiser}/diffusion_pytorch_model.safetensors"
    single = f"{'' if flow else 'A1111 reads single checkpoints alone: put the folder in place of the base pipeline’s own, and '}"
    script = (
        "convert that with diffusers' scripts/convert_diffusers_to_original_*.py."
        if not flow
        else ""
    )
    return [
        f"- diffusers: `<Pipeline>.from_pretrained(<base>, {denoiser}=<the network's class>.from_pretrained(<this folder>, "
        f"subfolder='{denoiser}'))`",
        f"- ComfyUI: put {file} into models/diffusion_models and load it with Load Diffusion Model, which reads diffusers' names.",
        *([f"- {single}{script}"] if single else []),
    ]


def _interval(values: list[float]) -> str:
    return f"{values[0]:.3g} [{values[1]:.3g}, {values[2]:.3g}]"
