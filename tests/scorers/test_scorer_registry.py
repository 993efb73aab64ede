"""A scorer of deradiff's has a module, a choice for `scorers=`, and a row of the documents."""

from pathlib import Path

import pytest
import yaml

from deradiff.scorers.registry import SCORERS, SETTINGS, module_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", SCORERS)
def test_a_module_can_check_and_load_it(name):
    entry = SCORERS[name]
    module = module_of(entry)
    assert callable(module.check) and callable(module.load)
    assert set(entry.settings) <= set(SETTINGS)


@pytest.mark.parametrize("name", SCORERS)
def test_scorers_can_name_it(name):
    file = ROOT / f"configs/scorers/{name}.yaml"
    assert file.is_file(), f"{file.relative_to(ROOT)} with the line {name}: {{}}"
    assert name in yaml.safe_load(file.read_text())


@pytest.mark.parametrize("name", SCORERS)
def test_the_documents_have_it(name):
    rows = [line for line in (ROOT / "docs/scorers.md").read_text().splitlines() if line[:1] == "|"]
    assert any(f"`{name}`" in row.split("|")[1] for row in rows), "a row in docs/scorers.md"
