"""Base models and autoencoders in one file: refused, with the command that converts them.

A single file (`sd_xl_base_1.0.safetensors`) names neither its tokenizers nor its scheduler.
diffusers takes them from the hub, and writes a folder that says all of it.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
from safetensors import safe_open

from deradiff.models.families import family_of_original
from deradiff.models.family import Family
from deradiff.models.weight_headers import check_fetched, check_whole, has_scaled_float8

ENDINGS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin", ".gguf")
"""How the names of single files end."""

DENOISER_PREFIX = "model.diffusion_model."
"""How the names of the denoiser's tensors begin in a whole checkpoint."""

ENCODER_PREFIXES = (
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "text_encoders.",
    "vae.",
)
"""How the names of other tensors begin in a whole checkpoint."""


def is_single_file(source: str) -> bool:
    """Whether a source is called as a file of weights is."""
    return source.lower().endswith(ENDINGS) and not Path(source).is_dir()


def base_refusal(source: str) -> str:
    """What to say of a base model that is a single file: how to make a folder of it.

    Args:
        source: the file.

    Raises:
        ValueError: for a file that cannot be read.
    """
    file = Path(source)
    if not file.is_file():
        return (
            f"there is no file {source}, and a base model is a folder with a model_index.json or a "
            "hub id such as org/name"
        )

    # What it holds is known of safetensors alone.
    family = None
    is_whole = True
    check_fetched(file, source)
    if file.suffix == ".safetensors":
        check_whole(file, source)
        if has_scaled_float8(file):
            return (
                f"{source} is a single file of float8 with scales, which diffusers does not "
                "convert: take it in float16 or bfloat16, or as an anchor of its base model"
            )
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
        family = family_of_original(name.removeprefix(DENOISER_PREFIX) for name in names)
        is_whole = any(name.startswith(ENCODER_PREFIXES) for name in names)
    return (
        f"{source} is a single file, and a base model is a folder in diffusers' layout: convert it "
        f'once with python -c "{_conversion(file, family, is_whole)}", and give {_folder(file)}'
    )


def autoencoder_refusal(vae: str, autoencoder_class: str) -> str:
    """What to say of an autoencoder that is a single file.

    Args:
        vae: the file.
        autoencoder_class: diffusers' class.
    """
    file = Path(vae)
    command = (
        f"from diffusers import {autoencoder_class} as A; "
        f"A.from_single_file('{file}').save_pretrained('{_folder(file)}')"
    )
    return (
        f"vae={vae} is a single file, and an autoencoder is a folder with a config.json: convert "
        f'it once with python -c "{command}", and give {_folder(file)}'
    )


def _conversion(file: Path, family: Family | None, is_whole: bool) -> str:
    """The statements that write a folder."""
    folder = _folder(file)
    pipeline = family.pipeline if family else "StableDiffusionXLPipeline"
    is_converted_whole = hasattr(getattr(diffusers, pipeline), "from_single_file")
    if family is None or (is_whole and is_converted_whole):
        return (
            f"from diffusers import {pipeline} as P; "
            f"P.from_single_file('{file}').save_pretrained('{folder}')"
        )
    return (
        f"from diffusers import {pipeline} as P, {family.denoiser_class} as D; "
        f"P.from_pretrained('<its pipeline>', {family.denoiser}=D.from_single_file('{file}'))"
        f".save_pretrained('{folder}')"
    )


def _folder(file: Path) -> Path:
    """Where the converted file goes."""
    return file.with_suffix("")
