"""A digest of an anchor's weights, so that one that was trained anew is not taken for its own predecessor."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def weights_digest(anchor: str | Path) -> str | None:
    """16 hexadecimal digits of a local anchor's weights, a folder's or a file's; None for a hub id.

    The header is digested in sorted order: safetensors writes its metadata in a random one, and saving the same anchor again is no change.
    """
    path = Path(anchor)
    files = (
        sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    )
    digest = hashlib.sha256()
    for file in files:
        add_file(digest, file)
    return digest.hexdigest()[:16] if files else None


def add_file(digest: Any, file: Path) -> None:
    """Add a file's content to a digest; of a safetensors file, its header in sorted order."""
    with open(file, "rb") as opened:
        if file.suffix == ".safetensors":
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            digest.update(json.dumps(header, sort_keys=True).encode())
        digest.update(hashlib.file_digest(opened, "sha256").digest())
