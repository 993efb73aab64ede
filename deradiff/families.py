"""What differs between the model families that deradiff aligns: one table, and the calls that read it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deradiff.runs import locate


@dataclass(frozen=True)
class Family:
    """One row of the table.

    denoiser: the pipeline's attribute that predicts the noise; also the folder that holds it in a checkpoint.
    lora_targets: the linear layers that a LoRA adapts, by the suffix of their name.
    """

    name: str
    pipeline: str
    denoiser: str
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


FAMILIES = {
    "sd15": Family("sd15", "StableDiffusionPipeline", "unet"),
    "sdxl": Family("sdxl", "StableDiffusionXLPipeline", "unet"),
}


def _named(class_name: str, where: str) -> Family:
    # img2img, inpainting and ControlNet pipelines share the prefix of their family's name; the longest prefix wins (XL before 1.5).
    fits = [f for f in FAMILIES.values() if class_name.startswith(f.pipeline.removesuffix("Pipeline"))]
    if not fits:
        raise ValueError(f"{where} is a {class_name}, which belongs to no family that deradiff knows ({', '.join(FAMILIES)})")
    return max(fits, key=lambda f: len(f.pipeline))


def family_of(pipe: Any) -> Family:
    """The family of a loaded diffusers pipeline. Raises ValueError for a pipeline of none."""
    return _named(type(pipe).__name__, "the pipeline")


def model_index(base: str, revision: str | None = None) -> dict[str, Any]:
    """`model_index.json` of a pipeline folder, hub id or `asset:` name; no weight is loaded. Raises ValueError naming what is missing."""
    base = locate(base)
    if Path(base).is_dir():
        file = Path(base) / "model_index.json"
        if not file.is_file():
            raise ValueError(f"{base} is not a diffusers pipeline: it has no model_index.json")
        return json.loads(file.read_text())
    if base.startswith((".", "/", "runs/")) or base.count("/") != 1:
        raise ValueError(f"there is no pipeline folder {base}; give a folder with a model_index.json or a hub id such as org/name")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return json.loads(Path(hf_hub_download(base, "model_index.json", revision=revision)).read_text())
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"the pipeline {base} is no local folder and could not be read from the hub ({type(error).__name__})") from error


def checkpoint_family(base: str, revision: str | None = None) -> Family:
    """The family of a pipeline folder or hub id, read from its index alone. Raises ValueError."""
    return _named(model_index(base, revision)["_class_name"], base)


def load_pipeline(base: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of a folder, hub id or `asset:` name; safety checker off, as in the published evaluation. Raises ValueError."""
    import diffusers

    base = locate(base)
    index = model_index(base, revision)
    family = _named(index["_class_name"], base)
    options = {"safety_checker": None} if "safety_checker" in index else {}
    pipe = getattr(diffusers, family.pipeline).from_pretrained(base, revision=revision, dtype=dtype, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_autoencoder(source: str, revision: str | None = None) -> None:
    """ValueError where `source` is no folder or hub id of an autoencoder; no weight is read."""
    folder = Path(locate(source))
    if (folder / "config.json").is_file():
        return
    if folder.exists() or source.startswith((".", "/", "runs/")) or source.count("/") != 1:
        raise ValueError(
            f"model.vae={source} is no autoencoder's folder: it has no config.json; give such a folder or a hub id such as org/name"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(source, "config.json", revision=revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"the autoencoder {source} is no local folder and could not be read from the hub ({type(error).__name__})"
        ) from error


def encode_prompts(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """What the denoiser reads of N prompts: `encoder_hidden_states` (N, L, C), and for SDXL `text_embeds` (N, P)."""
    encoded = pipe.encode_prompt(prompts, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    if family_of(pipe).name == "sdxl":
        return {"encoder_hidden_states": encoded[0], "text_embeds": encoded[2]}
    return {"encoder_hidden_states": encoded[0]}


def denoise(denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], resolution: int) -> Tensor:
    """The denoiser's output (B, C, H, W) for noisy latents of that shape, timesteps (B,) and the rows of `encode_prompts`.

    SDXL is also told the picture's size in pixels; training sees whole, uncropped squares: (R, R, 0, 0, R, R), as the published recipe.
    """
    added = {}
    if "text_embeds" in conditioning:
        size = [resolution, resolution, 0, 0, resolution, resolution]
        time_ids = torch.tensor([size], device=noisy.device, dtype=noisy.dtype).expand(len(noisy), -1)
        added = {"added_cond_kwargs": {"text_embeds": conditioning["text_embeds"], "time_ids": time_ids}}
    return denoiser(noisy, timesteps, encoder_hidden_states=conditioning["encoder_hidden_states"], **added, return_dict=False)[0]
