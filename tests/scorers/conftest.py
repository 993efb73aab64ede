"""A chat server for the tests of judges."""

from __future__ import annotations

import pytest

from tests.support.chat_server import chat_server


@pytest.fixture
def server():
    """A chat server of the test's own."""
    with chat_server() as running:
        yield running
