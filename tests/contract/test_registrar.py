"""The registrar keeps its expert in the registry through expired leases, restarts and refusals."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from expert_service.registrar import Registrar, Registration
from fusionroute.errors import FusionRouteError
from fusionroute.grpc_runtime import channel, server
from fusionroute.v1 import common_pb2
from tests.expert_fakes import MemoryRegistry, registry_service, unknown_slot, until, wrong_vocabulary

MINE = Registration("math-1", "math", "127.0.0.1:7", common_pb2.ModelIdentity(name="m", logits_width=9))


@asynccontextmanager
async def registering(address: str, **options: Any) -> AsyncIterator[Registrar]:
    async with (
        channel(address) as opened,
        Registrar([opened], MINE, lambda: common_pb2.Load(num_sessions=4), **options) as registrar,
    ):
        yield registrar


async def test_an_expert_registers_renews_and_leaves() -> None:
    registry = MemoryRegistry()
    async with server([registry_service(registry)]) as router:
        async with registering(router.address):
            await until(lambda: len(registry.heartbeats) >= 3)
            entry = registry.entries["math-1"]
            assert (entry.slot, entry.address, entry.model.logits_width) == ("math", "127.0.0.1:7", 9)
            assert registry.heartbeats[-1].load.num_sessions == 4
            assert len(registry.registered_at) == 1
        assert registry.entries == {}


async def test_an_expired_lease_leads_to_a_new_registration() -> None:
    registry = MemoryRegistry()
    async with server([registry_service(registry)]) as router, registering(router.address):
        await until(lambda: len(registry.heartbeats) >= 1)
        registry.entries.clear()
        await until(lambda: "math-1" in registry.entries)
        assert len(registry.registered_at) == 2


async def test_a_router_that_comes_late_is_found() -> None:
    async with server([]) as placeholder:
        port = placeholder.port
    registry = MemoryRegistry()
    async with registering(f"127.0.0.1:{port}", most_backoff_seconds=0.3):
        assert registry.entries == {}
        async with server([registry_service(registry)], port=port):
            await until(lambda: "math-1" in registry.entries)


async def test_a_router_that_restarts_without_its_memory_gets_the_expert_back() -> None:
    first, second = MemoryRegistry(), MemoryRegistry()
    async with server([registry_service(first)]) as router:
        port = router.port
        registrar = registering(router.address, most_backoff_seconds=0.3)
        await registrar.__aenter__()
        await until(lambda: "math-1" in first.entries)
    async with server([registry_service(second)], port=port):
        await until(lambda: "math-1" in second.entries)
        await registrar.__aexit__(None, None, None)


@pytest.mark.parametrize("refusal", [wrong_vocabulary, unknown_slot])
async def test_a_refusal_is_told_once_per_slow_try_until_the_router_agrees(
    refusal: Callable[[], FusionRouteError], capsys: pytest.CaptureFixture[str]
) -> None:
    registry = MemoryRegistry(refusal=refusal())
    async with (
        server([registry_service(registry)]) as router,
        registering(router.address, refused_retry_seconds=0.5),
    ):
        await until(lambda: len(registry.registered_at) >= 2)
        assert registry.registered_at[1] - registry.registered_at[0] >= 0.5
        output = capsys.readouterr().out
        assert refusal().message in output
        assert refusal().reason.value in output
        registry.refusal = None
        await until(lambda: "math-1" in registry.entries)


async def test_leaving_without_a_router_ends_soon() -> None:
    async with server([]) as placeholder:
        address = placeholder.address
    started_at = time.monotonic()
    async with registering(address):
        pass
    assert time.monotonic() - started_at < 4
