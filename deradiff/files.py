"""Files and folders: shipped assets, safe names, atomic writes, digests of weights, and run directories."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

ASSETS = Path(__file__).parent / "worlds" / "assets"
SAFE = re.compile(r"[^A-Za-z0-9._=+-]+")


def locate(text: str) -> str:
    """A path or hub id as it is written; `asset:<name>` is a folder that ships with deradiff. Raises ValueError for one that does not."""
    if not text.startswith("asset:"):
        return text
    folder = ASSETS / text.removeprefix("asset:")
    if not folder.is_dir():
        shipped = sorted(
            f"asset:{path.relative_to(ASSETS)}" for path in ASSETS.glob("*/*") if path.is_dir()
        )
        raise ValueError(f"deradiff ships no {text}; it ships {', '.join(shipped)}")
    return str(folder)


def slug(text: str, limit: int = 80) -> str:
    """A file-system safe name for any text; distinct texts get distinct names (a digest is added when anything was changed)."""
    safe = SAFE.sub("-", text).strip("-.")[:limit]
    return (
        safe if safe == text else f"{safe or 'x'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(aside, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def claim(run_dir: Path, config: dict[str, Any], ignore: tuple[str, ...] = ()) -> None:
    """Write `config.yaml` into a run directory, or check that the one there is the same: the same command resumes, another is refused.

    ignore: dotted keys (or prefixes of them) that may differ, because they do not change what the run produces.
    Raises ValueError that names the keys that differ.
    """
    file = run_dir / "config.yaml"
    if file.is_file():
        old, new = _flat(yaml.safe_load(file.read_text()) or {}), _flat(config)
        differ = [
            k for k in sorted(old | new) if old.get(k) != new.get(k) and not k.startswith(ignore)
        ]
        if differ:
            said = ", ".join(f"{k} ({old.get(k)} there, {new.get(k)} here)" for k in differ)
            raise ValueError(
                f"{run_dir} holds a run of another config: {said}; choose another name=... or remove that folder"
            )
    write_atomic(file, yaml.safe_dump(config, sort_keys=False))


def anchor_digest(anchor: str | Path) -> str | None:
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
