"""What differs between the model families that deradiff aligns: one table, and the calls that read it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from deradiff.files import locate
from deradiff.hub import commit_of, fetch, is_hub_id

TO_QKV = ("to_q", "to_k", "to_v", "to_out.0")
ADD_QKV = (
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)  # of the text's rows in joint attention
GUIDANCE = 3.5  # that a guidance-distilled FLUX is told in training: what its pipeline tells it, and diffusers' own examples
VARIANTS = "(ControlNet(Union)?)?(Img2Img|Inpaint|Inpainting)?"  # of a family's pipelines, all of which ask the denoiser the same way


@dataclass(frozen=True)
class Family:
    """One row of the table.

    denoiser: the pipeline's attribute that predicts the noise or the velocity; also the folder that holds it in a checkpoint.
    denoiser_class: of diffusers. flow: flow matching, x_t = (1 - t) x0 + t noise, and the denoiser predicts the velocity noise - x0.
    lora_targets: the linear layers that a LoRA adapts, by the suffix of their name. timestep_scale: the scheduler's time divided by what
    the denoiser is told. multiple: pixels that an image's sides are multiples of.
    """

    name: str
    pipeline: str
    denoiser: str
    denoiser_class: str
    flow: bool = False
    lora_targets: tuple[str, ...] = TO_QKV
    timestep_scale: float = 1.0
    multiple: int = 8


FAMILIES = {
    "sd15": Family("sd15", "StableDiffusionPipeline", "unet", "UNet2DConditionModel"),
    "sdxl": Family("sdxl", "StableDiffusionXLPipeline", "unet", "UNet2DConditionModel"),
    "sd3": Family(
        "sd3",
        "StableDiffusion3Pipeline",
        "transformer",
        "SD3Transformer2DModel",
        True,
        TO_QKV + ADD_QKV,
        multiple=16,
    ),
    "flux": Family(
        "flux",
        "FluxPipeline",
        "transformer",
        "FluxTransformer2DModel",
        True,
        TO_QKV + ADD_QKV,
        1000.0,
        16,
    ),
}


def _named(
    names: Sequence[str], parts: Mapping[str, Sequence[str]], where: str, encodes: bool = False
) -> Family:
    """The family of a pipeline that goes by any of the class names; parts: the names that each component goes by. encodes: it has no
    denoiser, and does not need one."""
    for family in FAMILIES.values():
        variants = family.pipeline.removesuffix("Pipeline") + VARIANTS + "Pipeline"
        fits = encodes or family.denoiser_class in parts.get(family.denoiser, ())
        if fits and any(re.fullmatch(variants, name) for name in names):
            return family
    denoiser = next((f" with a {parts[d][0]}" for d in ("unet", "transformer") if parts.get(d)), "")
    known = ", ".join(FAMILIES)
    raise ValueError(
        f"{where} is a {names[0]}{denoiser}, which belongs to no family that deradiff knows ({known}, and their variants)"
    )


def family_of(pipe: Any) -> Family:
    """The family of a loaded diffusers pipeline: text-to-image, img2img, inpainting or ControlNet; one that was loaded without its
    denoiser, to encode, goes by its class. Raises ValueError for one of none."""
    parts = {d: _class_names(unwrapped(getattr(pipe, d, None))) for d in ("unet", "transformer")}
    return _named(
        [c.__name__ for c in type(pipe).__mro__],
        parts,
        "the pipeline",
        encodes=not any(parts.values()),
    )


def _class_names(module: nn.Module | None) -> list[str]:
    """A network's class and what it inherits from: FSDP2 and users make subclasses."""
    return [] if module is None else [c.__name__ for c in type(module).__mro__]


def unwrapped(network: Any) -> Any:
    """The network itself where torch.compile, DDP or DeepSpeed have wrapped it."""
    while (
        inner := getattr(network, "_orig_mod", None) or getattr(network, "module", None)
    ) is not None:
        network = inner
    return network


def model_index(base: str, revision: str | None = None) -> dict[str, Any]:
    """`model_index.json` of a pipeline folder, hub id or `asset:` name; no weight is loaded. Raises ValueError naming what is missing."""
    return json.loads(_index_file(base, revision).read_text())


def base_commit(base: str, revision: str | None = None) -> str | None:
    """The commit of the hub that a base model's revision stands for at present; for a folder, `revision` as it is. Raises ValueError."""
    return commit_of(_index_file(base, revision)) or revision


def _index_file(base: str, revision: str | None) -> Path:
    base = locate(base)
    if Path(base).is_dir():
        file = Path(base) / "model_index.json"
        if not file.is_file():
            raise ValueError(f"{base} is not a diffusers pipeline: it has no model_index.json")
        return file
    if not is_hub_id(base):
        raise ValueError(
            f"there is no pipeline folder {base}; give a folder with a model_index.json or a hub id such as org/name"
        )
    try:
        return fetch(base, "model_index.json", revision)
    except OSError as error:
        raise ValueError(
            f"the pipeline {base} is no local folder and could not be read from the hub ({error})"
        ) from error


def _indexed(index: dict[str, Any], where: str) -> Family:
    parts = {
        d: [index[d][1]]
        for d in ("unet", "transformer")
        if isinstance(index.get(d), list) and index[d][1]
    }
    return _named([index["_class_name"]], parts, where)


def checkpoint_family(base: str, revision: str | None = None) -> Family:
    """The family of a pipeline folder or hub id, read from its index alone. Raises ValueError."""
    return _indexed(model_index(base, revision), base)


def load_pipeline(
    base: str, revision: str | None = None, dtype: torch.dtype = torch.float32, **parts: Any
) -> Any:
    """The text-to-image pipeline of a folder, hub id or `asset:` name; safety checker off, as published evaluations. parts: components in
    place of its own, which are then not loaded; None leaves one out. Raises ValueError."""
    import diffusers

    base = locate(base)
    index = model_index(base, revision)
    options = parts | ({"safety_checker": None} if "safety_checker" in index else {})
    pipe = getattr(diffusers, _indexed(index, base).pipeline).from_pretrained(
        base, revision=revision, dtype=dtype, **options
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_autoencoder(source: str, revision: str | None = None) -> None:
    """ValueError where `source` is no folder or hub id of an autoencoder; no weight is read."""
    folder = Path(locate(source))
    if (folder / "config.json").is_file():
        return
    if folder.exists() or not is_hub_id(source):
        raise ValueError(
            f"model.vae={source} is no autoencoder's folder: it has no config.json; give such a folder or a hub id such as org/name"
        )
    try:
        fetch(source, "config.json", revision)
    except OSError as error:
        raise ValueError(
            f"the autoencoder {source} is no local folder and could not be read from the hub ({error})"
        ) from error


def latent_shape(pipe: Any, resolution: int) -> tuple[int, int, int]:
    """(C, H, W) of a square image's latents. Raises ValueError for a side that the family's denoiser cannot cut into patches."""
    family = family_of(pipe)
    if resolution % family.multiple:
        raise ValueError(
            f"an image of {family.name} has sides that are multiples of {family.multiple} pixels, and {resolution} is none"
        )
    side = resolution // pipe.vae_scale_factor
    return pipe.vae.config.latent_channels, side, side


def encode_prompts(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """What the denoiser reads of N prompts: `encoder_hidden_states` (N, L, C) and, pooled over tokens, `text_embeds` (N, P) for SDXL,
    `pooled_projections` (N, P) for SD3 and FLUX."""
    family = family_of(pipe).name
    every: dict[str, Any] = {"device": pipe.device, "num_images_per_prompt": 1}
    if family == "flux":
        text, pooled, _ = pipe.encode_prompt(prompts, None, **every)
        return {"encoder_hidden_states": text, "pooled_projections": pooled}
    if family == "sd3":
        text, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, **every, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": text, "pooled_projections": pooled}
    encoded = pipe.encode_prompt(prompts, **every, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": encoded[0]} | (
        {"text_embeds": encoded[2]} if family == "sdxl" else {}
    )


def denoise(
    denoiser: nn.Module,
    noisy: Tensor,
    timesteps: Tensor,
    conditioning: dict[str, Tensor],
    resolution: int,
) -> Tensor:
    """The denoiser's output (B, C, H, W) for noisy latents of that shape, the scheduler's timesteps (B,) and the rows of `encode_prompts`.

    timesteps: 0 (data) to 1000 (noise), for flow models too. SDXL is also told the picture's size in pixels; training sees whole,
    uncropped squares: (R, R, 0, 0, R, R), as the published recipe. FLUX reads latents in patches of 2 x 2, and is told where each lies.
    """
    text = conditioning["encoder_hidden_states"]
    if FAMILIES["flux"].denoiser_class in _class_names(unwrapped(denoiser)):
        return _denoise_flux(denoiser, noisy, timesteps, text, conditioning["pooled_projections"])
    told: dict[str, Any] = {k: v for k, v in conditioning.items() if k == "pooled_projections"}
    if "text_embeds" in conditioning:
        size = [resolution, resolution, 0, 0, resolution, resolution]
        time_ids = torch.tensor([size], device=noisy.device, dtype=noisy.dtype).expand(
            len(noisy), -1
        )
        told = {
            "added_cond_kwargs": {"text_embeds": conditioning["text_embeds"], "time_ids": time_ids}
        }
    return denoiser(
        noisy, timestep=timesteps, encoder_hidden_states=text, **told, return_dict=False
    )[0]


def _denoise_flux(
    denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, text: Tensor, pooled: Tensor
) -> Tensor:
    rows, columns = noisy.shape[2] // 2, noisy.shape[3] // 2
    ids = torch.zeros(rows, columns, 3, device=noisy.device, dtype=noisy.dtype)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    guided = unwrapped(denoiser).config.guidance_embeds
    guidance = torch.full((len(noisy),), GUIDANCE, device=noisy.device) if guided else None
    packed = denoiser(
        pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2),
        timestep=timesteps / FAMILIES["flux"].timestep_scale,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=text,
        txt_ids=ids.new_zeros(text.shape[1], 3),
        img_ids=ids.flatten(0, 1),
        return_dict=False,
    )[0]
    return pixel_shuffle(packed.transpose(1, 2).unflatten(2, (rows, columns)), 2)
