"""Prompts from every kind of source, and their ids."""

import csv
import io
import itertools
import json

import pandas as pd
import pytest
import yaml

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


LIST = ["a red fox, in snow", 'a "quoted" word', '"Fall" in leaves', "zwölf Boxkämpfer"]


def csv_text(delimiter, header):
    rows = io.StringIO()
    writer = csv.writer(rows, delimiter=delimiter)
    writer.writerow(["id", header, "other"])
    writer.writerows([i, text, ""] for i, text in enumerate(LIST))
    return rows.getvalue()


FILES = {
    "p.txt": "\n".join(LIST),
    "p.TXT": "\r\n".join(LIST) + "\r\n",
    "no-ending": "\n".join(LIST),
    "p.csv": csv_text(",", "Prompt"),
    "p.CSV": csv_text(",", "Prompts"),
    "p.tsv": csv_text("\t", "caption"),
    "PartiPrompts.tsv": "Prompt\tCategory\n" + "".join(f"{text}\tArts\n" for text in LIST),
    "list.json": json.dumps(LIST),
    "records.json": json.dumps([{"Caption": text, "id": 1} for text in LIST]),
    "named.json": json.dumps({"prompts": LIST, "seed": 3}),
    "p.yaml": yaml.safe_dump(LIST),
    "named.yml": yaml.safe_dump({"prompts": [{"prompt": text} for text in LIST]}),
    "p.ndjson": "\n".join(json.dumps({"prompt": text}) for text in LIST) + "\n\n",
    "p.JSONL": "\r\n".join(json.dumps({"PROMPT": text}) for text in LIST),
    "texts.jsonl": "\n".join(json.dumps(text) for text in LIST),
}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a mark"])
@pytest.mark.parametrize("name", FILES)
def test_prompts_are_read_from_files_as_people_keep_them(tmp_path, name, mark):
    (tmp_path / name).write_bytes((mark + FILES[name]).encode())
    assert texts(str(tmp_path / name)) == LIST


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


@pytest.mark.parametrize("line", ["not json", '{"text": "a fox"}', "3", "[" * 100_000])
def test_a_line_without_a_prompt_is_refused_by_its_number(tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red fox"}\n' + line)
    check_refusal(str(tmp_path / "p.jsonl"), "line 2", '{"prompt": "a red fox"}')


def test_a_table_without_a_column_of_prompts_is_refused(tmp_path):
    pd.DataFrame({"text": ["a fox"]}).to_parquet(tmp_path / "p.parquet")
    check_refusal(str(tmp_path / "p.parquet"), "no column prompt or caption", "text")


BILLION = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in itertools.pairwise("abcdefghijkl")
)
"""Lists of lists that would take more than the memory where they are written out."""

NO_PROMPTS = {
    "utf-16.txt": "a red fox\n".encode("utf-16"),
    "utf-16.csv": "prompt\na red fox\n".encode("utf-16"),
    "latin-1.txt": "zwölf\n".encode("latin-1"),
    "archive.zip": b"PK\x03\x04\xff\xfe\x00",
    "torn.parquet": b"PAR1 torn PAR1",
    "header.csv": b"a red fox\na blue cat\n",
    "semicolons.csv": b"prompt;seed\na red fox;1\n",
    "quote.csv": b'prompt\n"a red fox\n',
    "short.csv": b"id,prompt\n1\n",
    "twice.csv": b"prompt,prompt\na red fox,a blue cat\n",
    "empty.csv": b"",
    "torn.json": b'["a red fox"',
    "deep.json": b"[" * 100_000,
    "number.json": b"[" + b"9" * 10_000 + b"]",
    "record.json": b'{"text": "a red fox"}',
    "null.json": b"null",
    "half.json": b'["\\ud83d"]',
    "half.jsonl": b'{"prompt": "\\ud83d"}',
    "torn.yaml": b"- 'a red fox",
    "deep.yaml": b"[" * 2_000,
    "bool.yaml": b"- yes\n- a red fox\n",
    "date.yaml": b"- 2024-13-77\n",
    "code.yaml": b"!!python/object/apply:os.system ['true']",
    "billion.yaml": f"{BILLION}prompts: [*l]".encode(),
    "itself.yaml": b"prompts: &a [*a]",
}


@pytest.mark.parametrize("name", NO_PROMPTS)
def test_a_file_that_holds_no_prompts_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(NO_PROMPTS[name])
    check_refusal(str(tmp_path / name), name)


def test_half_of_a_character_in_a_list_is_refused():
    check_refusal(["a fox", "\ud83d"], "prompt 2", "half of a character")


def test_a_file_of_more_than_any_text_is_not_read(tmp_path):
    with open(tmp_path / "large.txt", "wb") as file:
        file.truncate(2**40)
    check_refusal(str(tmp_path / "large.txt"), "large.txt")
