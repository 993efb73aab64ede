"""Files and folders: shipped assets, safe names, atomic writes, digests and run directories."""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "worlds" / "assets"
LFS_POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS leaves in the place of one that was not fetched."""

MOST_TEXT = 2**28
"""Bytes of a text file, at most: 256 MiB."""

UNSAFE = re.compile(r"[^A-Za-z0-9._=+-]+")

TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "unexpected pos", "No space left")
"""What torch.save says of a disk that is full."""

DIGEST = "digest"
"""The key under which a record that we write and read again holds the digest of its other keys."""

CONFIG_DIGEST = "# digest: "
"""How the first line of a `config.yaml` begins."""


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


def read_text(file: Path) -> str:
    """A text file's content, with line ends of one kind.

    Args:
        file: UTF-8, with or without a byte-order mark.

    Raises:
        ValueError: for what is no such text; the message names the file.
    """
    if file.stat().st_size > MOST_TEXT:
        raise ValueError(f"{file} has more than {MOST_TEXT} bytes, which no such text has")
    content = file.read_bytes()
    if content.startswith(LFS_POINTER):
        raise ValueError(
            f"{file} is a Git LFS pointer and not the file: run git lfs pull in its folder"
        )
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{file} is UTF-16, as PowerShell's > writes it: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is no UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_encodable(text: str) -> bool:
    """Whether a text is whole: JSON and a shell can write half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_json(text: str, name: str) -> Any:
    """The content of a JSON text.

    Args:
        text: the text.
        name: how an error names it.

    Raises:
        ValueError: where it is none, or is nested too deep to be read.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{name} is no JSON that can be read ({str(error)[:100]}): it is torn or something "
            "else, so fetch or copy it again"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file that holds settings by name.

    Args:
        file: the file.

    Raises:
        ValueError: where it is none, or is torn; the message names the file.
    """
    content = parse_json(read_text(file), str(file))
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no settings by name: fetch or copy it again")
    return content


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
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    remove_parts(run_dir)
    file = run_dir / "config.yaml"
    if file.is_file():
        # Keys that differ, without those that do not matter.
        old = _flat(_read_config(file))
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
    text = yaml.safe_dump(config, sort_keys=False)
    write_atomic(file, f"{CONFIG_DIGEST}{_digest_of_text(text)}\n{text}")


def _read_config(file: Path) -> dict[str, Any]:
    """The settings in a `config.yaml`. Raises ValueError for one that is not as it was written."""
    try:
        text = file.read_text()
        first, _, rest = text.partition("\n")
        is_sealed = first.startswith(CONFIG_DIGEST)
        is_whole = not is_sealed or first == CONFIG_DIGEST + _digest_of_text(rest)
        config = yaml.safe_load(text) or {}
    except (yaml.YAMLError, UnicodeDecodeError):
        is_whole = False
    if not is_whole or not isinstance(config, dict):
        raise ValueError(
            f"{file} is not what was written: if the run there is this command's, remove that "
            "file, and the same command goes on; otherwise choose another name for this run"
        )
    return config


def _digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
