"""What the tests of the data share."""

import pytest

from tests.support.tables import write_four_pairs


@pytest.fixture
def pair_file(tmp_path):
    """Four pairs, of which one is a tie: see `write_four_pairs`."""
    return write_four_pairs(tmp_path / "pairs.parquet")
