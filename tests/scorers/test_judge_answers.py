"""Answers of models: each is read by its rule, or refused."""

from __future__ import annotations

import json

import pytest

from deradiff.scorers.answers import (
    JsonChoice,
    JsonNumber,
    LabelledNumbers,
    LastNumber,
    Phrases,
    Range,
    UnreadableAnswer,
)

TEN = Range(1, 10)
PHRASES = Phrases("Image 1 is better", "Image 2 is better", "Both images are equally good")
ASPECTS = LabelledNumbers(["Alignment Score (1-5):", "Style Score (1-5):"], Range(1, 5))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"score": 7}', 7),
        ('```json\n{"score": 7.5}\n```', 7.5),
        ('<think>{"score": 2} or so?</think>\n{"score": 10, "why": "sharp"}', 10),
        ('{"score": 1.0}', 1),
    ],
)
def test_a_number_in_json(text, value):
    assert JsonNumber("score", TEN).read(text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no JSON object"),
        ("7", "holds no JSON object"),
        ('{"score": 7', "holds no JSON object"),
        ('{"score": 7,}', "is torn"),
        ('{"Score": 7}', "no number under 'score'"),
        ('{"score": "7"}', "no number under 'score'"),
        ('{"score": true}', "no number under 'score'"),
        ('{"score": null}', "no number under 'score'"),
        ('{"score": [7]}', "no number under 'score'"),
        ('{"score": NaN}', "no number under 'score'"),
        ('{"score": Infinity}', "no number under 'score'"),
        ('{"score": 1' + 400 * "0" + "}", "no number under 'score'"),
        ('{"score": 11}', "11 is not within 1 to 10"),
        ('{"score": 0.99}', "0.99 is not within 1 to 10"),
        ('{"score": -7}', "-7 is not within 1 to 10"),
    ],
)
def test_json_without_the_number_is_refused(text, words):
    with pytest.raises(UnreadableAnswer, match=words):
        JsonNumber("score", TEN).read(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("Three of 4 fingers are right, so 7.5.", 7.5),
        ("**Rating:** **8**", 8),
        ("Score: 3\n\nThank you!", 3),
    ],
)
def test_the_last_number(text, value):
    assert LastNumber(TEN).read(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "seven",
        "8/10",
        "8 / 10",
        "8 out of 10",
        "7-8",
        "7 to 8",
        "80%",
        "8 %",
        "7,5",
        "~8",
        "12",
    ],
)
def test_a_last_number_that_is_none_is_refused(text):
    with pytest.raises(UnreadableAnswer):
        LastNumber(TEN).read(text)


def test_the_mean_of_labelled_numbers():
    text = "Alignment Score (1-5): 2.5\nStyle Score (1-5): **4**\n"
    assert ASPECTS.read(text) == 3.25
    final = LabelledNumbers(["Final Score:"], Range(1, 5))
    assert final.read("fox (object): 1\nred (attribute): 0\nFinal Score: 3.") == 3


@pytest.mark.parametrize(
    "text",
    [
        "Alignment Score (1-5): 2.5",
        "Alignment Score (1-5): 2.5\nStyle Score (1-5): good",
        "Alignment Score (1-5): 2.5\nStyle Score (1-5): 4/5",
        "Alignment Score (1-5): 2.5\nStyle Score (1-5): 4 / 5",
        "Alignment Score (1-5): 2.5\nStyle Score (1-5): 4,5",
        "Alignment Score (1-5): 2.5\nStyle Score (1-5): 6",
        "Style Score (1-5): 3\nAlignment Score (1-5): 2.5\nStyle Score (1-5): 4",
    ],
)
def test_labels_without_their_numbers_are_refused(text):
    with pytest.raises(UnreadableAnswer):
        ASPECTS.read(text)


def test_a_choice_in_json():
    form = JsonChoice("better")
    assert [form.read(json.dumps({"better": n})) for n in (1, 2, 0)] == [1.0, 0.0, 0.5]
    for text in ('{"better": 3}', '{"better": 1.5}', '{"better": "1"}', "1"):
        with pytest.raises(UnreadableAnswer):
            form.read(text)


def test_a_choice_by_a_phrase():
    assert PHRASES.read("The light ... so image 1 is better.") == 1
    assert PHRASES.read("Image 2 is better.") == 0
    assert PHRASES.read("Both images are equally good.") == 0.5
    for text in ("", "Image 1.", "Image 1 is better. No: Image 2 is better."):
        with pytest.raises(UnreadableAnswer):
            PHRASES.read(text)
