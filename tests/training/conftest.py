"""Data that the objectives are tested on."""

import pytest

from deradiff.data.pairs import CaptionedImages, Pairs
from deradiff.worlds import shapes


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Twelve preference pairs of the shapes world."""
    path = tmp_path_factory.mktemp("data") / "pairs.parquet"
    shapes.write_pairs(path, 12, seed=0)
    return Pairs(str(path))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """24 captioned images of the shapes world."""
    path = tmp_path_factory.mktemp("data") / "images.parquet"
    shapes.write_images(path, 24, seed=0)
    return CaptionedImages(str(path))
