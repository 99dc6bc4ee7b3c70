"""A Redis for the tests of the policies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support_redis import RedisServer


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A running Redis without data; the test may stop and start it."""
    with RedisServer() as server:
        yield server
