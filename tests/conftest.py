"""A real Redis for the tests that need one; logs configured by one test are no matter of the next."""

import logging
import os
from collections.abc import AsyncIterator, Iterator

import pytest
import structlog
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


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Undoes what a daemon's command, run within a test, does to the logs of this process."""
    handlers, level = list(logging.root.handlers), logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
