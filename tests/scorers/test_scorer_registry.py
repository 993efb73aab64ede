"""The scorers by name: each is complete, and a wrong name is refused at once.

A scorer of deradiff's has a module, a choice for `scorers=`, and a row of the documents.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deradiff.scorers.registry import SCORERS, SETTINGS, module_of
from tests.support.scorer_images import assert_refused

ROOT = Path(__file__).parents[2]

CHECK_A_TYPO = """
import sys
from deradiff.scorers import check_scorer
try:
    check_scorer('x')
except ValueError:
    sys.exit('torch' in sys.modules)
sys.exit('not refused')
"""


@pytest.mark.parametrize("name", SCORERS)
def test_a_module_can_check_and_load_it(name: str) -> None:
    entry = SCORERS[name]
    module = module_of(entry)
    assert callable(module.check)
    assert callable(module.load)
    assert set(entry.settings) <= set(SETTINGS)


@pytest.mark.parametrize("name", SCORERS)
def test_scorers_can_name_it(name: str) -> None:
    file = ROOT / f"configs/scorers/{name}.yaml"
    assert file.is_file(), f"{file.relative_to(ROOT)} with the line {name}: {{}}"
    assert name in yaml.safe_load(file.read_text())


@pytest.mark.parametrize("name", SCORERS)
def test_the_documents_have_it(name: str) -> None:
    lines = (ROOT / "docs/scorers.md").read_text().splitlines()
    first_cells = [line.split("|")[1] for line in lines if line.startswith("|")]
    assert any(f"`{name}`" in cell for cell in first_cells), "a row in docs/scorers.md"


def test_unknown_names_and_settings_are_refused() -> None:
    unknown = "there is no scorer 'pikscore'; the scorers are pickscore, hpsv2, hpsv2.1, clip"
    assert_refused(unknown, "pikscore")
    assert_refused("crisp is a formula.*leave out checkpoint", "crisp", "x")


def test_a_typo_is_refused_without_importing_torch() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK_A_TYPO], cwd=ROOT)
    assert done.returncode == 0
