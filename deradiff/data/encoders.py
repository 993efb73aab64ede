"""Autoencoders, text encoders and tokenizers: told apart by its files, so that a run whose data is encoded loads none."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from deradiff.files import add_file, locate
from deradiff.hub import commit_of, fetch
from deradiff.models.base_model import BaseModel

ENCODERS = ("vae", "text_encoder", "image_encoder")  # how the names of a pipeline's parts begin
READERS = ("vae", "text_encoder", "tokenizer")  # of which the encodings depend on these


def encoders_key(base: str, revision: str | None = None, vae: str | None = None) -> str:
    """What tells a base model's encoders and tokenizers from any other's: a digest of their files, or a hub id with its commit. No weight
    becomes a network. vae: an autoencoder in place of the base's own. Raises ValueError where `base` is no pipeline."""
    index = BaseModel(base, revision).index
    parts = sorted(
        name
        for name, value in index.items()
        if name.startswith(READERS) and isinstance(value, list) and value[1]
    )
    own = [name for name in parts if not (vae and name == "vae")]
    kinds = " ".join(f"{name}={index[name][1]}" for name in parts)
    return f"{kinds} {source_key(base, revision, own, 'model_index.json')}" + (
        f" {source_key(vae)}" if vae else ""
    )


def source_key(
    source: str,
    revision: str | None = None,
    parts: list[str] | None = None,
    file: str = "config.json",
) -> str:
    """Of a folder, a digest of its files or of those of its subfolders `parts`; of a hub repository, id and commit, read off `file`."""
    folder = Path(locate(source))
    if not folder.is_dir():
        return f"{source}@{commit_of(fetch(source, file, revision)) or revision}"
    digest = hashlib.sha256()
    for root in [folder / part for part in parts] if parts is not None else [folder]:
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            if not any(
                name.startswith(".") for name in path.relative_to(root).parts
            ):  # what downloads and file browsers leave
                digest.update(
                    f"{root.name if parts else ''}/{path.relative_to(root).as_posix()}\n".encode()
                )
                add_file(digest, path)
    return digest.hexdigest()


def described_encoders(
    base: str, revision: str | None, vae: str | None, dtype: torch.dtype
) -> dict[str, Any]:
    """In place of a base model's encoders, for `BaseModel.load_pipeline`: an autoencoder without weights (meta device), which tells the
    shape, scale and precision of latents, and none of the others."""
    from diffusers import AutoencoderKL

    own = {"subfolder": "vae", "revision": revision}
    config = AutoencoderKL.load_config(locate(vae or base), **({} if vae else own))
    with torch.device("meta"):
        described = AutoencoderKL.from_config(config).type(dtype)
    return {name: None for name in BaseModel(base, revision).index if name.startswith(ENCODERS)} | {
        "vae": described
    }
