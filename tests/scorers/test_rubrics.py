"""Rubrics: those that ship can be used, and what is none is refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from deradiff.scorers.rubrics import DEFAULTS, load_rubric, shipped

ROOT = Path(__file__).parents[2]
MINE = """---
images: 1
answer: last number
lowest: 0
highest: 100
---
How good is this image for "{prompt}", from 0 to 100? {"no": "braces"} are special.
"""
PAIR = """---
images: 2
answer: json
key: best
---
{prompt}
"""


def write(folder: Path, text: str) -> str:
    (folder / "mine.txt").write_text(text)
    return str(folder / "mine.txt")


@pytest.mark.parametrize("name", shipped())
def test_a_rubric_that_ships_can_be_used_and_is_documented(name):
    images = 2 if "pair" in name else 1
    rubric = load_rubric(name, images)
    prompt = 'a {red} fox, "in" the snow'
    assert prompt in rubric.question(prompt) and "{prompt}" not in rubric.question(prompt)
    assert f"`{name}`" in (ROOT / "docs/scorers.md").read_text()


def test_the_default_ones_read_what_they_ask_for():
    score = load_rubric(None, 1)
    assert score.name == DEFAULTS[1]
    assert score.form.read('{"score": 7}') == 7
    assert '{"score": <number>}' in score.question("x") and "from 1 to 10" in score.question("x")
    pair = load_rubric(None, 2)
    assert pair.form.read('{"better": 2}') == 0
    assert '{"better": 0}' in pair.question("x")


def test_unifiedreward_s_answers_are_read():
    """In the form that its authors show."""
    second = load_rubric("unifiedreward-2", 1).form
    aspects = (2.5, 3.0, 3.5)
    names = ("Alignment", "Coherence", "Style")
    lines = [f"{name} Score (1-5): {value}" for name, value in zip(names, aspects)]
    assert second.read("\n".join(lines)) == pytest.approx(3)
    first = load_rubric("unifiedreward-1", 1).form
    assert first.read("fox (animal): 1\nFinal Score: 4.5") == 4.5
    pair = load_rubric("unifiedreward-pair", 2).form
    assert pair.read("... Image 2 is better.") == 0


def test_one_of_the_user_s(tmp_path):
    rubric = load_rubric(write(tmp_path, MINE), 1)
    asked = 'How good is this image for "a fox", from 0 to 100? {"no": "braces"} are special.'
    assert rubric.question("a fox") == asked
    assert rubric.form.read("93") == 93 and rubric.text == MINE
    assert load_rubric(write(tmp_path, PAIR), 2).form.read('{"best": 1}') == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must begin with a head between two lines of ---"),
        ("Rate {prompt}.", "must begin with a head"),
        ("x" + MINE, "must begin with a head"),
        (MINE.split("How")[0], "must begin with a head"),
        (MINE.replace("{prompt}", "it"), r"its question has no \{prompt\}"),
        (MINE.replace("images: 1", "images: [1"), "its head is no YAML"),
        ("---\n1\n---\n{prompt}", "its head holds no settings"),
        (MINE.replace("images: 1", "images: 2"), "says images: 2, and one with images: 1"),
        (MINE.replace("images: 1\n", ""), "says images: None, and one with images: 1"),
        (MINE.replace("last number", "number"), "needs answer: json or last number or labels"),
        (MINE.replace("last number", "json"), "needs key: <a text>"),
        (MINE.replace("last number", "labels"), r"needs labels: \[<texts>\]"),
        (MINE.replace("lowest: 0", "lowest: low"), "needs lowest: <a number>"),
        (MINE.replace("lowest: 0", "lowest: 100"), "says lowest: 100 and highest: 100"),
        (MINE.replace("highest: 100", "highest: .inf"), "says lowest: 0 and highest: inf"),
        (MINE.replace("lowest: 0", "lowest: .nan"), "says lowest: nan"),
        (MINE.replace("lowest: 0", "lowest: 0\nkey: x"), "holds key as well"),
    ],
)
def test_what_is_no_rubric_is_refused(tmp_path, text, words):
    with pytest.raises(ValueError, match=words) as error:
        load_rubric(write(tmp_path, text), 1)
    assert "\n" not in str(error.value)


def test_a_name_that_is_none_is_answered_with_those_that_are():
    with pytest.raises(ValueError, match=r"do you mean unifiedreward-2\? Others are pair, score"):
        load_rubric("unified-reward-2", 1)
    with pytest.raises(ValueError, match="those that ship are pair, score"):
        load_rubric("gone.txt", 1)
