"""Rubrics: what a model is asked about one image or two, and how its answer is read.

A rubric is a text file. Its head, between two lines of `---`, is YAML and says how the answer is
read; the rest is the question, with `{prompt}` in the place of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from deradiff.scorers.answers import (
    LARGEST,
    AnswerForm,
    JsonChoice,
    JsonNumber,
    LabelledNumbers,
    LastNumber,
    Phrases,
    Range,
)
from deradiff.text_files import read_text

FOLDER = Path(__file__).parent / "rubrics"
"""The rubrics that ship."""

DEFAULTS = {1: "score", 2: "pair"}
"""By how many images they are about."""

PLACE = "{prompt}"
FENCE = "---\n"
LIKENESS = 0.6


@dataclass(frozen=True)
class Rubric:
    """A rubric.

    Attributes:
        name: of one that ships, or its file.
        text: the whole file.
        template: the question, with `{prompt}` in it.
        form: how the answer is read.
    """

    name: str
    text: str
    template: str
    form: AnswerForm

    def question(self, prompt: str) -> str:
        """The question for a prompt."""
        return self.template.replace(PLACE, prompt)


def is_shipped(name: str) -> bool:
    """Whether a rubric ships by that name."""
    return name in shipped()


def shipped() -> list[str]:
    """The names of the rubrics that ship."""
    return sorted(file.stem for file in FOLDER.glob("*.txt"))


def load_rubric(name: str | None, images: int) -> Rubric:
    """A rubric by its name, or from a file.

    Args:
        name: of one that ships, or the path of a text file; None: the default one.
        images: how many images it is to be about, 1 or 2.

    Raises:
        ValueError: for what is no rubric about so many images.
    """
    name = name or DEFAULTS[images]
    file = FOLDER / f"{name}.txt" if is_shipped(name) else Path(name)
    if not file.is_file():
        near = get_close_matches(name, shipped(), 1, LIKENESS)
        meant = f"do you mean {near[0]}? Others" if near else "those that ship"
        raise ValueError(
            f"rubric={name} is no file, and none ships by that name; {meant} are "
            f"{', '.join(shipped())}"
        )
    return _parse(name, read_text(file), images)


def _parse(name: str, text: str, images: int) -> Rubric:
    """The rubric of a file's text. Raises ValueError."""
    try:
        start, head, template = text.split(FENCE, 2)
    except ValueError:
        start, head, template = text, "", ""
    if start or not template.strip():
        raise _mistake(name, "it must begin with a head between two lines of ---")
    if PLACE not in template:
        raise _mistake(name, f"its question has no {PLACE}")
    return Rubric(name, text, template.strip(), _Head(name, head).form(images))


def _mistake(name: str, what: str) -> ValueError:
    return ValueError(f"the rubric {name} cannot be used: {what} (docs/scorers.md has the form)")


class _Head:
    """A rubric's head, read key by key.

    Args:
        name: of the rubric.
        text: YAML.

    Raises:
        ValueError: where it holds no settings.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        try:
            self.values: Any = yaml.safe_load(text)
        except yaml.YAMLError:
            raise _mistake(name, "its head is no YAML") from None
        if not isinstance(self.values, dict):
            raise _mistake(name, "its head holds no settings")

    def form(self, images: int) -> AnswerForm:
        """How the answer is read.

        Args:
            images: how many images the rubric is to be about.

        Raises:
            ValueError: where it does not say so, and says what nobody reads.
        """
        about = self.values.pop("images", None)
        if about != images:
            raise _mistake(
                self.name,
                f"its head says images: {about}, and one with images: {images} is needed, such as "
                f"{DEFAULTS[images]}",
            )
        answer = self.values.pop("answer", None)
        forms = FORMS[images]
        if answer not in forms:
            raise _mistake(self.name, f"its head needs answer: {' or '.join(forms)}")
        form = forms[answer](self)
        if self.values:
            raise _mistake(self.name, f"its head holds {', '.join(map(str, self.values))} as well")
        return form

    def text_of(self, key: str) -> str:
        """A text. Raises ValueError where it is none."""
        value = self.values.pop(key, None)
        if not isinstance(value, str) or not value.strip():
            raise _mistake(self.name, f"its head needs {key}: <a text>")
        return value

    def texts_of(self, key: str) -> list[str]:
        """A list of different texts. Raises ValueError where it is none."""
        value = self.values.pop(key, None)
        is_list = isinstance(value, list) and bool(value)
        if not is_list or not all(isinstance(one, str) and one.strip() for one in value):
            raise _mistake(self.name, f"its head needs {key}: [<texts>]")
        return value

    def number_of(self, key: str) -> float:
        """A number. Raises ValueError where it is none."""
        value = self.values.pop(key, None)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _mistake(self.name, f"its head needs {key}: <a number>")
        return value

    def range(self) -> Range:
        """The range of a number. Raises ValueError where it is empty."""
        lowest = self.number_of("lowest")
        highest = self.number_of("highest")
        if not lowest < highest < LARGEST:
            raise _mistake(self.name, f"its head says lowest: {lowest} and highest: {highest}")
        return Range(lowest, highest)


def _json_number(head: _Head) -> AnswerForm:
    return JsonNumber(head.text_of("key"), head.range())


def _last_number(head: _Head) -> AnswerForm:
    return LastNumber(head.range())


def _labelled_numbers(head: _Head) -> AnswerForm:
    return LabelledNumbers(head.texts_of("labels"), head.range())


def _json_choice(head: _Head) -> AnswerForm:
    return JsonChoice(head.text_of("key"))


def _phrases(head: _Head) -> AnswerForm:
    return Phrases(head.text_of("first"), head.text_of("second"), head.text_of("tie"))


FORMS: dict[int, dict[str, Callable[[_Head], AnswerForm]]] = {
    1: {"json": _json_number, "last number": _last_number, "labels": _labelled_numbers},
    2: {"json": _json_choice, "phrases": _phrases},
}
"""The forms of answers, by the number of images and by the head's `answer`."""
