"""What a model's answer says, read by a stated rule or not at all.

A rubric states the rule and the range of the numbers. An answer that does not keep to them is
never guessed at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
FLAT_OBJECT = re.compile(r"\{[^{}]*\}")
LARGEST = 1e9
"""No scale goes as far."""

EMPHASIS = "*_`\"'()[]:;,.!"
"""What may stand around a number in a sentence, or in Markdown."""

BEFORE_A_BOUND = ("of", "to", "/", "-", "–")
"""Words after which a number is the end of a scale and not the answer: 8 out of 10."""

FIRST = 1.0
SECOND = 0.0
TIE = 0.5
"""What a judge of pairs prefers: the first image, the second one, or neither."""

CHOICES = {1: FIRST, 2: SECOND, 0: TIE}
"""The same as an answer in JSON says it."""


class UnreadableAnswer(ValueError):
    """An answer that does not keep to the rule; the message says in what."""


class AnswerForm(Protocol):
    """How an answer is read."""

    @property
    def scale(self) -> str:
        """What the number is, in a few words."""

    def read(self, text: str) -> float:
        """The number in an answer.

        Raises:
            UnreadableAnswer: where there is none by the rule.
        """

    def wanted(self) -> str:
        """What the model is asked for once more, in a few words."""


@dataclass(frozen=True)
class Range:
    """The range of a number, ends included.

    Attributes:
        lowest: the lower end.
        highest: the upper end.
    """

    lowest: float
    highest: float

    def check(self, value: float) -> float:
        """The value itself. Raises UnreadableAnswer where it is outside."""
        if not self.lowest <= value <= self.highest:
            raise UnreadableAnswer(f"{value:g} is not within {self}")
        return value

    def __str__(self) -> str:
        return f"{self.lowest:g} to {self.highest:g}"


@dataclass(frozen=True)
class JsonNumber:
    """The number under a key of the last JSON object in the answer.

    Attributes:
        key: of the number.
        range: of the number.
    """

    key: str
    range: Range

    @property
    def scale(self) -> str:
        """See `AnswerForm.scale`."""
        return f"rating, {self.range}"

    def read(self, text: str) -> float:
        """See `AnswerForm.read`."""
        return self.range.check(json_number(text, self.key))

    def wanted(self) -> str:
        """See `AnswerForm.wanted`."""
        return f'JSON alone, {{"{self.key}": <a number of {self.range}>}}'


@dataclass(frozen=True)
class LastNumber:
    """The last number of the answer.

    What is a share, the end of a scale (8/10, 8 out of 10) or a percentage is no answer.

    Attributes:
        range: of the number.
    """

    range: Range

    @property
    def scale(self) -> str:
        """See `AnswerForm.scale`."""
        return f"rating, {self.range}"

    def read(self, text: str) -> float:
        """See `AnswerForm.read`."""
        words = [word.strip(EMPHASIS) for word in text.split()]
        places = [place for place, word in enumerate(words) if re.search(r"\d", word)]
        if not places:
            raise UnreadableAnswer("it holds no number")
        last = places[-1]
        before = words[last - 1] if last else ""
        after = words[last + 1] if last + 1 < len(words) else ""
        is_bound = before.lower() in BEFORE_A_BOUND or after.startswith(("/", "%"))
        if is_bound or not NUMBER.fullmatch(words[last]):
            raise UnreadableAnswer(f"its last number, {words[last]!r}, does not stand alone")
        return self.range.check(float(words[last]))

    def wanted(self) -> str:
        """See `AnswerForm.wanted`."""
        return f"one number of {self.range} alone"


@dataclass(frozen=True)
class LabelledNumbers:
    """The mean of the numbers that stand right behind some labels, each of which is there once.

    Attributes:
        labels: the texts before the numbers.
        range: of each number.
    """

    labels: Sequence[str]
    range: Range

    @property
    def scale(self) -> str:
        """See `AnswerForm.scale`."""
        return f"mean of {len(self.labels)} ratings, {self.range}"

    def read(self, text: str) -> float:
        """See `AnswerForm.read`."""
        values = [self.range.check(number_behind(text, label)) for label in self.labels]
        return sum(values) / len(values)

    def wanted(self) -> str:
        """See `AnswerForm.wanted`."""
        lines = " and ".join(f"{label} <number>" for label in self.labels)
        return f"{lines} alone, each number of {self.range}"


@dataclass(frozen=True)
class JsonChoice:
    """Which of two images is better, under a key of the last JSON object: 1, 2, or 0 for neither.

    Attributes:
        key: of the choice.
    """

    key: str

    @property
    def scale(self) -> str:
        """See `AnswerForm.scale`."""
        return "preference"

    def read(self, text: str) -> float:
        """See `AnswerForm.read`."""
        value = json_number(text, self.key)
        if value not in CHOICES:
            raise UnreadableAnswer(f"{value:g} is none of 1, 2 and 0")
        return CHOICES[int(value)]

    def wanted(self) -> str:
        """See `AnswerForm.wanted`."""
        return f'JSON alone, {{"{self.key}": <1, 2, or 0 for neither>}}'


@dataclass(frozen=True)
class Phrases:
    """Which of two images is better, by the one of three phrases that the answer holds.

    Attributes:
        first: says that the first image is better.
        second: says that the second one is.
        tie: says that neither is.
    """

    first: str
    second: str
    tie: str

    @property
    def scale(self) -> str:
        """See `AnswerForm.scale`."""
        return "preference"

    def read(self, text: str) -> float:
        """See `AnswerForm.read`."""
        meanings = {self.first: FIRST, self.second: SECOND, self.tie: TIE}
        held = [phrase for phrase in meanings if phrase.lower() in text.lower()]
        if len(held) != 1:
            raise UnreadableAnswer(f"it holds {len(held)} of the three conclusions, not one")
        return meanings[held[0]]

    def wanted(self) -> str:
        """See `AnswerForm.wanted`."""
        return f'one of "{self.first}", "{self.second}" and "{self.tie}" alone'


def json_number(text: str, key: str) -> float:
    """The number under a key of the last JSON object in a text that holds no other object.

    Raises:
        UnreadableAnswer: where there is none.
    """
    objects = FLAT_OBJECT.findall(text)
    if not objects:
        raise UnreadableAnswer("it holds no JSON object")
    try:
        values: Any = json.loads(objects[-1])
    except (ValueError, RecursionError):
        raise UnreadableAnswer("its last JSON object is torn") from None
    value = values.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # A comparison, because an integer may be too large for a float
    if not is_number or not abs(value) < LARGEST:
        raise UnreadableAnswer(f"its last JSON object has no number under {key!r}")
    return float(value)


def number_behind(text: str, label: str) -> float:
    """The number right behind a label; white space and Markdown's stars may stand between them.

    Raises:
        UnreadableAnswer: where the label is not there once, or no number stands there alone.
    """
    count = text.count(label)
    if count != 1:
        raise UnreadableAnswer(f"it holds {label!r} {count} times, not once")
    rest = text.partition(label)[2].lstrip(" \t\n*")
    found = NUMBER.match(rest)
    behind = rest[found.end() :].lstrip(" *") if found else ""
    if found is None or re.match(r"[/%\d]|[.,]\d", behind):
        raise UnreadableAnswer(f"no number stands alone behind {label!r}")
    return float(found[0])
