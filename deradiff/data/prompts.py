"""Prompts from a file, a list or a published set, each with an id that can name a file."""

from __future__ import annotations

import hashlib
import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deradiff.data.prompt_files import FORMATS, read_prompt_file
from deradiff.data.prompt_sets import load_prompt_set
from deradiff.data.published_prompts import PROMPT_SETS, SHAPES
from deradiff.files import UNSAFE
from deradiff.texts import is_encodable
from deradiff.worlds.shapes import held_out_captions

SOURCES = f"{FORMATS}, a list such as ['a red fox'], or one of {SHAPES}, {', '.join(PROMPT_SETS)}"
"""What prompts may be read from, for messages."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and its id.

    Attributes:
        prompt_id: safe in a file name. It is a function of the text alone; where a text comes
            again, also of how often it came before.
        text: the prompt.
    """

    prompt_id: str
    text: str


def load_prompts(prompts: str | Sequence[str], limit: int | None = None) -> list[Prompt]:
    """Read prompts, in the order of their source.

    Args:
        prompts: a file, a list, or the name of a set, as `SOURCES` says.
        limit: at most so many, evenly spaced over the source, because neighbours are often alike.
            A prompt's id does not depend on it.

    Raises:
        ValueError: for an unknown or empty source, and for a blank prompt.
    """
    # Read them, and refuse what cannot be a prompt.
    texts = _texts(prompts)
    if not texts:
        raise ValueError(f"prompts={prompts} is empty: give {SOURCES}")
    where = prompts if isinstance(prompts, str) else "the list of prompts"
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"prompt {number} of {where} is {reprlib.repr(text)}, but every prompt needs "
                "words: remove it or write some"
            )
        # JSON and a shell can write half of a character, which no tokenizer takes.
        if not is_encodable(text):
            raise ValueError(
                f"prompt {number} of {where} is {reprlib.repr(text)}, which holds half of a "
                "character: write the file as UTF-8"
            )

    # Give each an id. A prompt that comes again has its number in the id.
    loaded = []
    occurrences: Counter[str] = Counter()
    for text in texts:
        occurrences[text] += 1
        is_repeated = occurrences[text] > 1
        suffix = f"-{occurrences[text]}" if is_repeated else ""
        loaded.append(Prompt(prompt_id(text) + suffix, text))

    # Keep as many as are wanted, evenly spaced.
    count = min(limit or len(loaded), len(loaded))
    return [loaded[i * len(loaded) // count] for i in range(count)]


def prompt_id(text: str) -> str:
    """The first words of a text, as a file name can hold them, and a digest of it.

    Args:
        text: any text.

    Returns:
        At most 53 ASCII characters, of which 12 are hexadecimal digits of the text's SHA-256.
    """
    words = UNSAFE.sub("-", text[:200]).strip("-.")[:40].rstrip("-.")
    return f"{words or 'prompt'}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _texts(prompts: str | Sequence[str]) -> list[Any]:
    # A list, or a name.
    if not isinstance(prompts, str):
        return list(prompts)
    if prompts == SHAPES:
        return held_out_captions()
    if prompts in PROMPT_SETS:
        return load_prompt_set(prompts)

    # A file.
    path = Path(prompts)
    if not path.is_file():
        raise ValueError(f"prompts={prompts[:200]} is no prompt file: give {SOURCES}")
    return read_prompt_file(path)
