"""Text of somebody else, made harmless for where it is to stand: a terminal, Markdown, Python."""

from __future__ import annotations

import json
import re

import yaml

MARKDOWN = re.compile(r"([\\`*\[\]|#])")
"""Characters that would make a link, an image, code or a cell of the text."""

HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}

PLAIN_YAML = re.compile(r"[A-Za-z][\w-]*(?:[./ ][\w-]+)*")


def is_encodable(text: str) -> bool:
    """Whether a text is whole: JSON and a shell can write half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """A text for the terminal: what would move the cursor or hide text is written as its code.

    Args:
        text: any text.
    """
    characters = []
    for character in text:
        is_shown = character.isprintable() or character in "\n\t"
        characters.append(character if is_shown else repr(character)[1:-1])
    return "".join(characters)


def on_one_line(text: str) -> str:
    """A text for the terminal, as `printable`, and with its line breaks as codes.

    Args:
        text: any text.
    """
    return printable(text).replace("\n", "\\n")


def in_markdown(text: str) -> str:
    """A text as Markdown shows it, on one line: no markup of its own, and no HTML.

    Args:
        text: any text.
    """
    line = MARKDOWN.sub(r"\\\1", printable(" ".join(text.split())))
    return "".join(HTML.get(character, character) for character in line)


def in_python(text: str) -> str:
    """A text as a string in Python.

    Args:
        text: any text.
    """
    return json.dumps(text)


def in_yaml(text: str) -> str:
    """A text as a value in YAML.

    Args:
        text: any text.
    """
    is_plain = PLAIN_YAML.fullmatch(text) is not None and yaml.safe_load(text) == text
    return text if is_plain else json.dumps(text)
