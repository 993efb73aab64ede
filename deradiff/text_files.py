"""Text files of anybody: read whole and as UTF-8, or refused by their name."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS leaves in the place of one that was not fetched."""

MOST_TEXT = 2**28
"""Bytes of a text file, at most: 256 MiB."""


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
