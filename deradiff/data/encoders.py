"""The encoders of a base model, recognised by their files and not loaded.

A run whose data is encoded already loads no autoencoder and no text encoder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from deradiff.assets import locate
from deradiff.digests import add_file
from deradiff.hub import commit_of, fetch
from deradiff.models.base_model import INDEX, BaseModel

ENCODERS = ("vae", "text_encoder", "image_encoder")
"""Beginnings of the names of a pipeline's large components that encode."""

KEY_PARTS = ("vae", "text_encoder", "tokenizer")
"""Beginnings of the names of the components that the encodings depend on."""


def encoders_key(base: BaseModel) -> str:
    """A text that differs between base models whose encodings differ.

    It holds a digest of the files of the encoders and tokenizers, or a hub id with its commit. No
    weight becomes a network.

    Args:
        base: a base model. If another autoencoder replaces its own, that one counts.

    Raises:
        ValueError: where the base model is not a pipeline.
    """
    # The names and classes of the components.
    parts = []
    for name, value in base.index.items():
        is_component = isinstance(value, list) and value[1]
        if is_component and name.startswith(KEY_PARTS):
            parts.append(name)
    parts.sort()
    classes = " ".join(f"{name}={base.index[name][1]}" for name in parts)

    # Their files; those of the autoencoder that replaces the base model's own come last.
    own = [name for name in parts if not (base.vae and name == "vae")]
    key = f"{classes} {source_key(base.source, base.revision, own, INDEX)}"
    return f"{key} {source_key(base.vae)}" if base.vae else key


def source_key(
    source: str,
    revision: str | None = None,
    parts: list[str] | None = None,
    file: str = "config.json",
) -> str:
    """A text that differs between sources whose files differ.

    Args:
        source: a folder, hub id or `asset:` name.
        revision: of the hub.
        parts: subfolders that count; None: the whole folder.
        file: a file of the hub's repository; the path of its cached copy holds the commit.

    Returns:
        A digest of a folder's files; a hub id with its commit.
    """
    # On the hub, the commit stands for the files.
    folder = Path(locate(source))
    if not folder.is_dir():
        return f"{source}@{commit_of(fetch(source, file, revision)) or revision}"

    # In a folder, their names and contents count.
    roots = [folder] if parts is None else [folder / part for part in parts]
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            names = path.relative_to(root).parts
            # Hidden files are left by downloads and file browsers.
            if any(name.startswith(".") for name in names):
                continue
            prefix = root.name if parts else ""
            digest.update(f"{prefix}/{path.relative_to(root).as_posix()}\n".encode())
            add_file(digest, path)
    return digest.hexdigest()


def encoders_without_weights(base: BaseModel, dtype: torch.dtype) -> dict[str, Any]:
    """Components in place of a base model's encoders, for `BaseModel.load_pipeline`.

    The autoencoder is there without weights (meta device), because it says the shape, scale and
    precision of latents. In place of the text encoders there is nothing.

    Args:
        base: the base model.
        dtype: the precision that the autoencoder would have.
    """
    parts: dict[str, Any] = {name: None for name in base.index if name.startswith(ENCODERS)}
    parts["vae"] = base.describe_vae(dtype)
    return parts
