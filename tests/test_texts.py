"""Text of somebody else in a terminal, in Markdown, in Python and in YAML."""

import ast
import json
import re

import pytest
import yaml

from configs.checks import check_run_name
from deradiff.anchors.anchor import AnchorCard
from deradiff.anchors.model_card import README, write_model_card
from deradiff.evaluation.tables.table import _escaped
from deradiff.texts import in_markdown, in_python, in_yaml, on_one_line, printable

HOSTILE = [
    'x"); import os; os.system("true") #',
    "<script>alert(1)</script>",
    "a | b",
    "![x](https://example.org/a.png)",
    "```\nrm -rf",
    "a\x1b]0;title\x07b\x1b[2J",
    "a\u202eb",
    "- a: b",
    "'",
    "\\",
    "null",
    "",
    "{base}",
]


def test_a_terminal_gets_no_escape_sequences():
    assert printable("a\x1b[2Jb\rc\u202ed é 日本") == "a\\x1b[2Jb\\rc\\u202ed é 日本"
    assert printable("two\nlines") == "two\nlines"
    assert on_one_line("two\nlines\r\x1b") == "two\\nlines\\r\\x1b"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_one_value_wherever_it_stands(text):
    assert ast.literal_eval(in_python(text)) == text
    assert yaml.safe_load(f"key: {in_yaml(text)}") == {"key": text}
    line = in_markdown(text)
    assert "\n" not in line
    assert "<" not in line
    assert "](" not in line.replace("\\](", "")
    assert "<" not in _escaped(text)
    assert "\x1b" not in _escaped(text)


@pytest.mark.parametrize("text", [text for text in HOSTILE if text and text.isprintable()])
def test_a_card_writes_no_code_into_the_readme(tmp_path, text):
    card = AnchorCard(
        base_model=text,
        base_revision=text,
        family="sd15",
        method="lora",
        beta=2000,
        objective=text,
        beta_convention=text,
        device=text,
        dataset=text,
        versions={"torch": text},
    )
    write_model_card(tmp_path, card, {"optimizer": text})
    readme = (tmp_path / README).read_text()

    # The front matter holds the tags that are meant, and the code does what it says.
    _, header, body = readme.split("---\n", maxsplit=2)
    front = yaml.safe_load(header)
    assert front["tags"][:1] == ["deradiff"]
    assert len(front["tags"]) == 4
    code = readme.split("```python\n")[2].split("```")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert [ast.unparse(call.func) for call in calls] == ["StableDiffusionPipeline.from_pretrained"]
    assert "<script>" not in re.sub(r"```.*?```|`[^`]*`", "", body, flags=re.DOTALL)
    rows = [line for line in readme.split("\n") if line.startswith("| ")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)


@pytest.mark.parametrize(
    "name", ["../../x", "/tmp/x", "a/../../b", "..", ".", "", "a\x1b[2J", "a\nb", "a\x00b"]
)
def test_a_run_stays_below_the_folder_of_runs(name):
    with pytest.raises(ValueError, match="name="):
        check_run_name(name, "runs")


@pytest.mark.parametrize("name", ["first", "sdxl-dpo-beta2000", "sweep/beta=500", "..a", "日本"])
def test_a_name_below_the_folder_of_runs_is_taken(name):
    check_run_name(name, "runs")


def test_json_is_python_for_any_text():
    assert json.loads(in_python("é\u2028")) == ast.literal_eval(in_python("é\u2028"))
