"""One stack of tiny models with a chat template, on gRPC and HTTP, for all tests in this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.judges.environment import judge_stack
from tests.served_stack import Stack


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("family")
    async with judge_stack(folder) as stack:
        yield stack


@pytest.fixture
def http_url(stack: Stack) -> str:
    """Where its HTTP is."""
    assert stack.router.http_url is not None
    return stack.router.http_url
