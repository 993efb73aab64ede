"""Prompts from every kind of source, and their ids."""

import json

import pandas as pd
import pytest

from deradiff.data.prompts import load_prompts, prompt_id
from deradiff.worlds.shapes import held_out_captions, training_captions


def texts(source):
    return [prompt.text for prompt in load_prompts(source)]


def write_json_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_every_kind_of_source_gives_the_same_prompts(tmp_path):
    prompts = ["a red fox, in snow", "zwölf Boxkämpfer", "a\u2028line separator stays inside"]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(prompts).encode())
    write_json_lines(tmp_path / "p.jsonl", [{"prompt": text, "other": 1} for text in prompts])
    write_json_lines(tmp_path / "c.jsonl", [{"caption": text} for text in prompts])
    pd.DataFrame({"caption": prompts, "x": 1}).to_parquet(tmp_path / "p.parquet")
    for name in ("p.txt", "bom.txt", "p.jsonl", "c.jsonl", "p.parquet"):
        assert texts(str(tmp_path / name)) == prompts, name
    assert texts(prompts) == prompts


def test_shapes_are_the_captions_that_training_never_saw():
    assert texts("shapes") == held_out_captions()
    assert not set(texts("shapes")) & set(training_captions())


# Ids

AWKWARD = [
    "🦊🦊🦊",
    "x" * 10_000,
    "a/b\\c:d*e?f",
    "../../etc/passwd",
    "CON",
    "con",
    "a cat",
    "A cat",
    "a  cat",
    ".hidden",
    "-rf",
    "a\nb",
    "a\x00b",
    "日本の猫",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_an_id_names_a_file_whatever_the_prompt_holds(text, tmp_path):
    name = prompt_id(text)
    assert len(name) <= 53
    assert name.isascii()
    assert name[0] not in ".-"
    file = tmp_path / f"{name}-s0.png"
    file.touch()
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_ids_are_distinct_even_where_case_is_not_and_do_not_move():
    assert len({prompt_id(text).lower() for text in AWKWARD}) == len(AWKWARD)
    assert prompt_id("a red fox") == "a-red-fox-647c3a6520b8"


def test_repeated_prompts_get_ids_of_their_own_and_order_does_not_matter():
    first = load_prompts(["a fox", "a cat", "a fox", "a fox"])
    second = load_prompts(["a fox", "a fox", "a cat", "a fox"])
    ids = {prompt.prompt_id for prompt in first}
    assert len(ids) == 4
    assert ids == {prompt.prompt_id for prompt in second}
    assert first[0].prompt_id == prompt_id("a fox")
    assert first[1].prompt_id == prompt_id("a cat")


# What is refused


def check_refusal(source, *words):
    """Check that a source is refused in one sentence that holds all words."""
    with pytest.raises(ValueError) as error:
        load_prompts(source)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_list_that_is_empty_or_holds_a_blank_is_refused():
    check_refusal([], "empty")
    check_refusal(["a fox", " \t"], "prompt 2", "words")
    check_refusal(["a fox", ""], "prompt 2")
    check_refusal(["a fox", 3], "prompt 2 of the list of prompts is 3")


def test_a_text_that_is_no_file_is_refused(tmp_path):
    check_refusal("a red fox", "prompts=a red fox is no prompt file", "['a red fox']")
    check_refusal(str(tmp_path), "no prompt file")


def test_a_text_file_that_is_empty_or_holds_a_blank_is_refused(tmp_path):
    (tmp_path / "blank.txt").write_text("a fox\n\na cat\n")
    check_refusal(str(tmp_path / "blank.txt"), "prompt 2", "blank.txt")
    (tmp_path / "empty.txt").write_text("")
    check_refusal(str(tmp_path / "empty.txt"), "empty.txt is empty")


@pytest.mark.parametrize("line", ["not json", '{"text": "a fox"}', "3"])
def test_a_line_without_a_prompt_is_refused_by_its_number(tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red fox"}\n' + line)
    check_refusal(str(tmp_path / "p.jsonl"), "line 2", '{"prompt": "a red fox"}')


def test_a_table_without_a_column_of_prompts_is_refused(tmp_path):
    pd.DataFrame({"text": ["a fox"]}).to_parquet(tmp_path / "p.parquet")
    check_refusal(str(tmp_path / "p.parquet"), "no column prompt or caption", "it has text")
