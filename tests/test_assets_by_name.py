"""What ships with deradiff has a name."""

from __future__ import annotations

import os

import pytest

from deradiff.assets import locate


def test_an_asset_is_a_folder_that_ships_and_anything_else_stays_as_it_is():
    assert os.path.isdir(locate("asset:shapes/base"))
    assert locate("org/name") == "org/name"
    with pytest.raises(ValueError, match=r"ships no asset:none; it ships .*asset:shapes/base"):
        locate("asset:none")
