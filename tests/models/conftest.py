"""A tiny pipeline of every family, loaded; not to be changed."""

from __future__ import annotations

import pytest

from tests.support.realign_world import BASES


@pytest.fixture(scope="session")
def pipes():
    """Pipelines by family."""
    return BASES
