"""Digests: of records and files that are checked when they are read again, and of weights, to tell
them apart."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from deradiff.files import write_atomic

log = logging.getLogger(__name__)

DIGEST = "digest"
"""The key under which a record that we write and read again holds the digest of its other keys."""


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """A record with a digest of its content, which `unsealed` checks.

    Args:
        values: what JSON can hold.
    """
    return values | {DIGEST: _digest_of_values(values)}


def unsealed(values: Any) -> dict[str, Any]:
    """The content of a record of `sealed`. One without a digest is returned as it is.

    Raises:
        ValueError: for a record that is not as it was written, and for what is none.
    """
    if not isinstance(values, dict):
        raise ValueError("it is no record of keys and values")
    content = {key: value for key, value in values.items() if key != DIGEST}
    try:
        is_whole = DIGEST not in values or values[DIGEST] == _digest_of_values(content)
    except RecursionError:
        is_whole = False
    if not is_whole:
        raise ValueError("it is not what was written")
    return content


def _digest_of_values(values: dict[str, Any]) -> str:
    return digest_of_text(json.dumps(values, sort_keys=True))


def digest_of_text(text: str) -> str:
    """16 hexadecimal digits that tell a text from any other.

    Args:
        text: the text.
    """
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_with_digest(path: Path, data: bytes) -> None:
    """As `write_atomic`, with a digest in a hidden file beside it, for `is_as_written`.

    Raises:
        OSError: where it cannot be written.
    """
    write_atomic(_digest_file(path), hashlib.sha256(data).hexdigest() + "\n")
    write_atomic(path, data)


def is_as_written(path: Path) -> bool:
    """Whether a file of `write_with_digest` is there, and is what was written.

    The whole file is read. One that is damaged is named in the log and removed, so that it is made
    again. One without a digest, of an earlier version, is taken as it is.
    """
    if not path.is_file():
        return False
    try:
        stated = _digest_file(path).read_text().strip()
    except FileNotFoundError:
        return True
    with open(path, "rb") as file:
        is_same = hashlib.file_digest(file, "sha256").hexdigest() == stated
    if not is_same:
        log.warning("%s is not what was written, and is made again", path)
        path.unlink(missing_ok=True)
    return is_same


def _digest_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def anchor_digest(anchor: str | Path) -> str | None:
    """16 hexadecimal digits of a local anchor's weights; None for a hub id.

    It tells an anchor that was trained anew from its predecessor of the same name. Saving the same
    anchor again does not change it, and neither does the order of a safetensors file's metadata,
    which is random in files of other programs. A file is read once in a process, as long as its
    size, its time and its place on the disk stay.

    Args:
        anchor: a folder, of which the configs of networks count too, or a file.
    """
    # The files that hold weights, or say of which network they are.
    path = Path(anchor)
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = sorted([*path.rglob("*.safetensors"), *path.rglob("config.json")])
    if not files:
        return None

    # Their contents, in the order of their names.
    digest = hashlib.sha256()
    for file in files:
        add_file(digest, file)
    return digest.hexdigest()[:16]


def add_file(digest: Any, file: Path) -> None:
    """Add a file's content to a digest of hashlib.

    A safetensors file's header is added in sorted order, because other programs write it in a
    random one.
    """
    status = file.stat()
    for part in _contents(file, status.st_size, status.st_mtime_ns, status.st_ino):
        digest.update(part)


@functools.lru_cache(maxsize=1024)
def _contents(file: Path, size: int, time: int, inode: int) -> tuple[bytes, ...]:
    """What stands for a file's content in a digest; the other arguments tell it from a later one.

    Of a damaged safetensors file the whole content counts.
    """
    with open(file, "rb") as opened:
        header = _header(opened, size) if file.suffix == ".safetensors" else b""
        rest = hashlib.file_digest(opened, "sha256").digest()
    return (header, rest) if header else (rest,)


def _header(opened: Any, size: int) -> bytes:
    """The header of an open safetensors file, sorted; empty, from the file's start, for no such."""
    try:
        length = int.from_bytes(opened.read(8), "little")
        if length <= size:
            return json.dumps(json.loads(opened.read(length)), sort_keys=True).encode()
    except ValueError:
        pass
    opened.seek(0)
    return b""


def sort_metadata(file: Path) -> None:
    """Put the texts in a safetensors file's header into order, in place.

    safetensors writes them in a random one. In order, equal tensors make equal files.

    Args:
        file: that nobody reads yet.
    """
    with open(file, "r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # The header keeps its length, as the tensors keep their places. It may end in spaces.
        assert len(text) <= length
        opened.seek(8)
        opened.write(text.ljust(length))
