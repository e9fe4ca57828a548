"""A real Redis for the tests that need one."""

import os
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from fusionroute.private_redis import PrivateRedis, connect


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """One private server for all tests of a run; tests use keys of their own.

    FUSIONROUTE_TEST_REDIS_URL (unix://...) names another server, to try another version of Redis.
    """
    if url := os.environ.get("FUSIONROUTE_TEST_REDIS_URL"):
        yield url
        return
    with PrivateRedis() as server:
        yield server.url


@pytest.fixture
async def redis_client(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()
