"""The scorers by name: a wrong name is refused at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_unknown_names_and_settings_are_refused() -> None:
    unknown = "there is no scorer 'pikscore'; the scorers are pickscore, hpsv2, hpsv2.1, clip"
    assert_refused(unknown, "pikscore")
    assert_refused("crisp is a formula.*leave out checkpoint", "crisp", "x")


def test_a_typo_is_refused_without_importing_torch() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK_A_TYPO], cwd=ROOT)
    assert done.returncode == 0
