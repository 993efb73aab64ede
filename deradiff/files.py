"""Files and folders: safe names, and writes that leave a whole file or none."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

UNSAFE = re.compile(r"[^A-Za-z0-9._=+-]+")

TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "unexpected pos", "No space left")
"""What torch.save says of a disk that is full."""


def slug(text: str, limit: int = 80) -> str:
    """A name for the file system, for any text.

    Different texts get different names: a digest is added where anything was changed.
    """
    safe = UNSAFE.sub("-", text).strip("-.")[:limit]
    if safe == text:
        return safe
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{safe or 'x'}-{digest}"


def nearest_folder(path: Path) -> Path:
    """The path itself if it exists, or else the first of its parents that does."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


class CannotWrite(OSError):
    """A file cannot be written; the sentence names it."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file where a disk is full, or a file cannot be written for another reason.

    Args:
        path: what the block writes.

    Raises:
        CannotWrite: in one sentence, for what the system, safetensors or torch raise.
    """
    try:
        yield
    except CannotWrite:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        is_of_torch = isinstance(error, RuntimeError)
        if is_of_torch and not any(sign in str(error) for sign in TORCH_CANNOT_WRITE):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CannotWrite(
            f"{path} cannot be written ({reason}): make room, or give a folder that can be "
            "written, and the same command goes on"
        ) from error


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new, never a part.

    Raises:
        OSError: where it cannot be written; the old content stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, and see it on the disk.

    Where the last writer was killed within a line, or met a full disk, the new line still stands
    alone.

    Args:
        path: the file; it is made where it is missing.
        line: without its end.

    Raises:
        OSError: where it cannot be written.
    """
    with writing(path), open(path, "ab+") as file:
        text = line + "\n"
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def remove_parts(folder: Path) -> None:
    """Remove what killed writers have left in a folder and those below it.

    Args:
        folder: in which nobody writes now.
    """
    for path in list(folder.rglob(".*part")):
        if path.is_dir() and path.name.endswith(".part"):
            shutil.rmtree(path)
        elif path.name.endswith(".part"):
            path.unlink(missing_ok=True)
