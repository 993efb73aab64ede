"""Where data sets are, and what is refused."""

import pytest

from configs.checks import section
from deradiff.data.pairs import Pairs
from deradiff.data.sources import parquet_files


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path=.*nowhere\.parquet does not exist"):
        Pairs(str(tmp_path / "nowhere.parquet"))


def test_a_stage_names_the_key_where_the_library_names_the_argument():
    message = r"^data\.path=nowhere\.parquet does not exist"
    with pytest.raises(ValueError, match=message), section("data"):
        parquet_files("nowhere.parquet", "train")


def test_a_stage_leaves_a_message_that_names_no_argument_as_it_is():
    with pytest.raises(ValueError, match=r"^the file is empty$"), section("data"):
        raise ValueError("the file is empty")
