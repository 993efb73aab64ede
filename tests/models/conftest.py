"""A tiny pipeline of every family, made once and not to be changed."""

from __future__ import annotations

import pytest

from deradiff.models.families import FAMILIES
from tests.support.tiny_pipelines import save_tiny, tiny_pipeline


@pytest.fixture(scope="session")
def pipes():
    """Loaded pipelines by family."""
    return {family: tiny_pipeline(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Their folders by family."""
    root = tmp_path_factory.mktemp("families")
    return {family: save_tiny(family, root / family) for family in FAMILIES}
