"""`make test-versions`: lower bounds are those of pyproject.toml, and each row says how it ended.

The environments themselves take minutes and the network, and are made by that command alone.
"""

import pytest

from benchmarks import versions
from benchmarks.versions import FAILED, NOT_RUN, PASSED, Row, lower_bounds, with_pins


def test_every_requirement_has_a_lower_bound():
    bounds = lower_bounds(versions.read_project())
    names = [bound.partition("==")[0] for bound in bounds]
    assert {"torch", "hydra-core", "pytest", "mkdocs"} <= set(names)
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="numpy says no lower bound"):
        lower_bounds({"name": "a", "dependencies": ["numpy"], "optional-dependencies": {"dev": []}})


def test_a_pin_takes_the_place_of_its_packages_bound():
    assert with_pins(["torch==2.11", "numpy==2.0"], ["torch==2.13.0"]) == [
        "torch==2.13.0",
        "numpy==2.0",
    ]


@pytest.mark.parametrize(
    ("pip", "tests", "status", "note"),
    [
        ((0, ""), (0, "....\n5 passed in 2.0s\n"), PASSED, "5 passed in 2.0s (0 min)"),
        ((0, ""), (1, "F\n1 failed in 2.0s\n\n"), FAILED, "1 failed in 2.0s (0 min)"),
        ((1, "Collecting\nERROR: no torch\n"), None, FAILED, "ERROR: no torch ("),
    ],
)
def test_a_row_says_how_its_tests_ended(tmp_path, monkeypatch, pip, tests, status, note):
    answers = [pip, tests]
    commands = []

    def answer(command, log):
        commands.append([str(word) for word in command])
        return answers.pop(0)

    monkeypatch.setattr(versions, "_run", answer)
    monkeypatch.setattr(versions, "find_python", lambda version: "/bin/true")
    monkeypatch.setattr(versions, "installed", lambda python: {"torch": "2.13.0+cpu"})
    row = versions.check("3.11", versions.OLDEST, ["torch==2.13.0"], tmp_path / "row")
    assert (row.status, row.note[: len(note)]) == (status, note)
    assert (tmp_path / "row/constraints.txt").read_text().startswith("torch==2.13.0\ndiffusers==")
    assert commands[0][-2:] == ["-e", ".[dev]"]


def test_a_python_that_is_not_there_is_said_and_fails_nothing(tmp_path, capsys):
    assert versions.main(["--row", "3.99:newest", "--out", str(tmp_path)]) == 0
    assert "| 3.99 | newest |" in capsys.readouterr().out
    assert "not run: there is no Python 3.99 here" in (tmp_path / "table.md").read_text()
    with pytest.raises(SystemExit):
        versions.parse_arguments(["--row", "newest"])


def test_the_table_has_a_column_a_package():
    table = versions.markdown([Row("3.11", "oldest", NOT_RUN, "none", {"torch": "2.13.0"})])
    head, rule, line = table.splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    assert line.startswith("| 3.11 | oldest | 2.13.0 |")
