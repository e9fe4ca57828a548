"""Who may call: keys over real connections, replaced while both ends run."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fusionroute.access import ClientAccess, ServerAccess
from fusionroute.access_check import shown_key
from fusionroute.api_keys import ApiKeys, ShownKey
from fusionroute.errors import AccessDenied, Reason
from fusionroute.grpc_runtime import RunningServer, channel, server
from fusionroute.health_probe import status_of
from tests.doorman import NEXT, SHOP, Doorman, ask, ask_over, both_streams, key, service_of, stream


async def test_calls_and_streams_need_a_known_key(keys_file: Path) -> None:
    doorman = Doorman()
    async with server([service_of(doorman)], access=ServerAccess(keys=ApiKeys(keys_file))) as running:
        assert await ask(running.address, key(SHOP)) == "math"
        assert await stream(running.address, key(SHOP)) == [0, 1, 2]
        assert await both_streams(running.address, key(SHOP)) == [7]
        assert doorman.callers == ["shop"] * 5
        for access in (None, key(NEXT)):
            for call in (ask, stream, both_streams):
                with pytest.raises(AccessDenied) as caught:
                    await call(running.address, access)
                assert caught.value.reason is Reason.UNAUTHENTICATED
                assert NEXT not in caught.value.message
        assert len(doorman.callers) == 5


async def test_liveness_needs_no_key_but_reflection_does(keys_file: Path) -> None:
    async with server([], access=ServerAccess(keys=ApiKeys(keys_file))) as running:
        async with channel(running.address) as opened:
            health = health_pb2_grpc.HealthStub(opened)
            assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=10)).status == 1
            listing = reflection_pb2_grpc.ServerReflectionStub(opened).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [answer async for answer in listing]
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert await asyncio.to_thread(status_of, running.address) == "SERVING"


async def test_keys_are_replaced_without_a_restart_of_either_end(tmp_path: Path, keys_file: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text(f"{SHOP}\n")
    client = ClientAccess(key=ShownKey(mine))
    async with (
        server([service_of(Doorman())], access=ServerAccess(keys=ApiKeys(keys_file))) as running,
        channel(running.address, access=client) as opened,
    ):
        assert await ask_over(opened) == "math"
        keys_file.write_text(f"shop:{SHOP}\nshop:{NEXT}\n")  # both, for as long as the clients need
        await until_it_is(running, key(NEXT), accepted=True)
        mine.write_text(f"{NEXT}\n")
        async with asyncio.timeout(20):
            while client.metadata() != key(NEXT).metadata():
                assert await ask_over(opened) == "math"
                await asyncio.sleep(0.1)
        keys_file.write_text(f"shop:{NEXT}\n")
        while await accepts(running, key(SHOP)):
            assert await ask_over(opened) == "math"
            await asyncio.sleep(0.1)
        assert await ask_over(opened) == "math"


async def until_it_is(running: RunningServer, access: ClientAccess, *, accepted: bool) -> None:
    async with asyncio.timeout(20):
        while await accepts(running, access) != accepted:
            await asyncio.sleep(0.1)


async def accepts(running: RunningServer, access: ClientAccess) -> bool:
    try:
        return await ask(running.address, access) == "math"
    except AccessDenied:
        return False


async def test_a_refusal_is_logged_once_a_second_without_the_key(keys_file: Path) -> None:
    async with server([], access=ServerAccess(keys=ApiKeys(keys_file))) as running:
        with structlog.testing.capture_logs() as logs:
            for _ in range(5):
                with pytest.raises(AccessDenied):
                    await ask(running.address, key(NEXT))
    refusals = [entry for entry in logs if entry["event"] == "access_denied"]
    assert 1 <= len(refusals) < 5
    assert NEXT not in str(logs) and SHOP not in str(logs)


@pytest.mark.parametrize(
    ("metadata", "shown"),
    [
        ([("authorization", "Bearer abc")], b"abc"),
        ([("x", "y"), ("authorization", "bearer  abc ")], b"abc"),
        ([], None),
        (None, None),
        ([("authorization", "abc")], None),
        ([("authorization", "Bearer ")], None),
        ([("authorization", "Basic abc")], None),
        ([("authorization", "Bearer " + "x" * 513)], None),
        ([("authorization", "Bearer abc"), ("authorization", "Bearer abd")], None),
    ],
)
def test_the_key_is_read_from_one_bearer_header(metadata: Any, shown: bytes | None) -> None:
    assert shown_key(metadata) == shown


def test_a_check_costs_microseconds(keys_file: Path) -> None:
    keys_file.write_text("".join(f"k{n}:{SHOP}{n}\n" for n in range(16)))
    keys = ApiKeys(keys_file)
    best = min(timed(lambda: keys.name_of(b"wrong" * 8)) for _ in range(2000))
    assert best < 0.001, "a thousandth of a second would already be a thousand times too slow"


def timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
