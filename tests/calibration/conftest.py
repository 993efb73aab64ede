"""Pairs that anchors are calibrated on."""

import pytest

from deradiff.data.pairs import Pairs
from deradiff.worlds import shapes


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Twelve preference pairs of the shapes world."""
    path = tmp_path_factory.mktemp("data") / "pairs.parquet"
    shapes.write_pairs(path, 12, seed=0)
    return Pairs(str(path))
