"""Fixtures that several files of contract tests share: access, a served stack, a served trainer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import SecretStr

from fusionroute.private_redis import PrivateRedis, connect
from fusionroute.trainer_client import TrainerClient
from tests.certificates import Authority
from tests.doorman import SHOP
from tests.fake_trainer import FAKE_JOB_COMMAND
from tests.http_calls import Api
from tests.served_stack import Family, Stack, make_family, served
from tests.served_trainer import Serve, Served
from trainer.bootstrap import running_trainer
from trainer.settings import TrainerSettings


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"shop:{SHOP}\n")
    return path


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
async def stack(family: Family) -> AsyncIterator[Stack]:
    async with served(family, early_asks="off") as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(stack: Stack) -> AsyncIterator[Api]:
    """OpenAI's API of a module's own stack, which lasts as long as the module's tests."""
    async with Api.of(stack) as api:
        yield api


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Starts trainers with settings; they share a Redis that no other test knows."""
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(PrivateRedis())
        redis_client = connect(redis.url)
        stack.push_async_callback(redis_client.aclose)

        async def start(**changes: Any) -> Served:
            quick = {"job_heartbeat_seconds": 0.05, "job_lease_seconds": 5.0, "job_retry_seconds": 0.05}
            settings = TrainerSettings(
                port=0,
                redis_url=SecretStr(redis.url),
                jobs_dir=tmp_path / "jobs",
                checkpoints_dir=tmp_path / "checkpoints",
                **{**quick, **changes},
            )
            (tmp_path / "checkpoints").mkdir(exist_ok=True)
            trainer = await stack.enter_async_context(running_trainer(settings, FAKE_JOB_COMMAND))
            client = await stack.enter_async_context(TrainerClient.open(trainer.server.address))
            return Served(trainer, client, tmp_path, redis_client)

        yield start
