"""Files and folders: shipped assets, safe names, atomic writes, digests and run directories."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

ASSETS = Path(__file__).parent / "worlds" / "assets"
UNSAFE = re.compile(r"[^A-Za-z0-9._=+-]+")


def locate(text: str) -> str:
    """The folder of an `asset:<name>`; any other path or hub id as it is.

    Raises:
        ValueError: for an asset that does not ship with deradiff.
    """
    if not text.startswith("asset:"):
        return text
    folder = ASSETS / text.removeprefix("asset:")
    if not folder.is_dir():
        folders = [path for path in ASSETS.glob("*/*") if path.is_dir()]
        shipped = sorted(f"asset:{path.relative_to(ASSETS)}" for path in folders)
        raise ValueError(f"deradiff ships no {text}; it ships {', '.join(shipped)}")
    return str(folder)


def slug(text: str, limit: int = 80) -> str:
    """A name for the file system, for any text.

    Different texts get different names: a digest is added where anything was changed.
    """
    safe = UNSAFE.sub("-", text).strip("-.")[:limit]
    if safe == text:
        return safe
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{safe or 'x'}-{digest}"


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(aside, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def nearest_folder(path: Path) -> Path:
    """The path itself if it exists, or else the first of its parents that does."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def claim(run_dir: Path, config: dict[str, Any], ignore: tuple[str, ...] = ()) -> None:
    """Write `config.yaml` into a run directory, or check that the one there is the same.

    So the same command resumes a run, and another command is refused.

    Args:
        run_dir: the run directory.
        config: nested settings.
        ignore: dotted keys, or beginnings of them, that may differ because they do not change what
            the run produces.

    Raises:
        ValueError: where another config is there; it names the keys that differ.
    """
    file = run_dir / "config.yaml"
    if file.is_file():
        # Keys that differ, without those that do not matter.
        old = _flat(yaml.safe_load(file.read_text()) or {})
        new = _flat(config)
        changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
        changed = [key for key in changed if not key.startswith(ignore)]
        if changed:
            values = ", ".join(f"{k} ({old.get(k)} there, {new.get(k)} here)" for k in changed)
            raise ValueError(
                f"{run_dir} holds a run of another config: {values}; "
                "choose another name for this run, or remove that folder"
            )

    # What does not matter is written too, as this command has it.
    write_atomic(file, yaml.safe_dump(config, sort_keys=False))


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def anchor_digest(anchor: str | Path) -> str | None:
    """16 hexadecimal digits of a local anchor's weights; None for a hub id.

    It tells an anchor that was trained anew from its predecessor of the same name. Saving the same
    anchor again does not change it: a safetensors file's header is digested in sorted order,
    because its metadata is written in a random one.

    Args:
        anchor: a folder or a file.
    """
    # The files that hold weights.
    path = Path(anchor)
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = sorted(path.rglob("*.safetensors"))
    if not files:
        return None

    # Their contents, in the order of their names.
    digest = hashlib.sha256()
    for file in files:
        add_file(digest, file)
    return digest.hexdigest()[:16]


def add_file(digest: Any, file: Path) -> None:
    """Add a file's content to a digest of hashlib.

    A safetensors file's header is added in sorted order, because it is written in a random one.
    """
    with open(file, "rb") as opened:
        if file.suffix == ".safetensors":
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
            digest.update(json.dumps(header, sort_keys=True).encode())
        digest.update(hashlib.file_digest(opened, "sha256").digest())
