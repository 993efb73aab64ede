import json

import pandas as pd
import pytest

from deradiff.data.prompts import load_prompts, prompt_id
from deradiff.worlds.shapes import held_out_captions, training_captions


def texts(source):
    return [prompt.text for prompt in load_prompts(source)]


def test_every_kind_of_source_gives_the_same_prompts(tmp_path):
    wanted = ["a red fox, in snow", "zwölf Boxkämpfer", "a\u2028line separator stays inside"]
    (tmp_path / "p.txt").write_text("\n".join(wanted) + "\n", encoding="utf-8")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(wanted).encode())
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "other": 1}) + "\n" for p in wanted)
    )
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"caption": p}) + "\n" for p in wanted))
    pd.DataFrame({"caption": wanted, "x": 1}).to_parquet(tmp_path / "p.parquet")
    for source in ("p.txt", "bom.txt", "p.jsonl", "c.jsonl", "p.parquet"):
        assert texts(str(tmp_path / source)) == wanted, source
    assert texts(wanted) == wanted


def test_shapes_are_the_captions_that_training_never_saw():
    assert texts("shapes") == held_out_captions()
    assert not set(texts("shapes")) & set(training_captions())


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
    assert len(name) <= 53 and name.isascii() and name[0] not in ".-"
    file = tmp_path / f"{name}-s0.png"
    file.touch()
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_ids_are_distinct_even_where_case_is_not_and_do_not_move():
    assert len({prompt_id(text).lower() for text in AWKWARD}) == len(AWKWARD)
    assert prompt_id("a red fox") == "a-red-fox-647c3a6520b8"


def test_repeated_prompts_get_ids_of_their_own_and_order_does_not_matter():
    first = load_prompts(["a fox", "a cat", "a fox", "a fox"])
    second = load_prompts(["a fox", "a fox", "a cat", "a fox"])
    assert len({p.prompt_id for p in first}) == 4
    assert {p.prompt_id for p in first} == {p.prompt_id for p in second}
    assert first[0].prompt_id == prompt_id("a fox") and first[1].prompt_id == prompt_id("a cat")


def refused(source, *words):
    with pytest.raises(ValueError) as error:
        load_prompts(source)
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said


def test_what_is_no_list_of_prompts_is_refused_in_one_sentence(tmp_path):
    refused([], "empty")
    refused(["a fox", " \t"], "prompt 2", "words")
    refused(["a fox", ""], "prompt 2")
    refused(["a fox", 3], "prompt 2 of the list of prompts is 3")
    refused("a red fox", "no prompt file a red fox", "['a red fox']")
    refused(str(tmp_path), "no prompt file")
    (tmp_path / "blank.txt").write_text("a fox\n\na cat\n")
    refused(str(tmp_path / "blank.txt"), "prompt 2", "blank.txt")
    (tmp_path / "empty.txt").write_text("")
    refused(str(tmp_path / "empty.txt"), "empty.txt is empty")
    for broken in ("not json", '{"text": "a fox"}', "3"):
        (tmp_path / "p.jsonl").write_text('{"prompt": "a fox"}\n' + broken)
        refused(str(tmp_path / "p.jsonl"), "line 2", '{"prompt": "a red fox"}')
    pd.DataFrame({"text": ["a fox"]}).to_parquet(tmp_path / "p.parquet")
    refused(str(tmp_path / "p.parquet"), "no column prompt or caption", "it has text")
