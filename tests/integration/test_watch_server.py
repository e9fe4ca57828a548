"""The watch port over real HTTP: the three questions about health, metrics, keys, starting and stopping."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Sequence

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from fusionroute.engine.steps import EngineLoad
from fusionroute.grpc_runtime import PortTaken, channel, server
from fusionroute.health import READINESS, Progress, ServerHealth
from fusionroute.metrics import EngineCollector, Exposition
from fusionroute.settings import DaemonSettings
from fusionroute.watch_server import Watched, watching
from tests.expert_fakes import until

KEY = b"open-sesame-open-sesame-open-sesame"


class WatchedSettings(DaemonSettings):
    """Of no particular daemon."""

    table = "router"


class OneKey:
    """Accepts one key."""

    def name_of(self, shown: bytes) -> str | None:
        return "probe" if shown == KEY else None


class Pulse:
    """Work that moves or does not."""

    def __init__(self) -> None:
        self.progress = Progress(pending=False, tick=0)
        self.lacks: Sequence[str] = ()

    async def why_not_ready(self) -> Sequence[str]:
        return self.lacks


async def get(address: str, path: str, **headers: str) -> tuple[int, str]:
    """Status and body."""

    def ask() -> tuple[int, str]:
        request = urllib.request.Request(f"http://{address}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as response:  # noqa: S310 - http, see above
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(ask)


def watched(health: ServerHealth, **changes) -> Watched:
    return Watched(health, Exposition(CollectorRegistry()), **changes)


async def test_an_idle_service_is_live_progressing_and_ready() -> None:
    async with (
        server([]) as running,
        watching(WatchedSettings(watch_port=0), watched(running.health)) as address,
    ):
        for path in ("/livez", "/progressz", "/readyz"):
            status, body = await get(address, path)
            assert status == 200, (path, body)
        assert json.loads((await get(address, "/readyz"))[1]) == {"ready": True, "reasons": []}


async def test_frozen_work_is_not_progressing_and_not_ready_but_live() -> None:
    pulse = Pulse()
    pulse.progress = Progress(pending=True, tick=7)
    async with (
        server([], progress=lambda: pulse.progress, frozen_after_seconds=0.2) as running,
        watching(WatchedSettings(watch_port=0), watched(running.health)) as address,
    ):
        await until(lambda: not running.health.is_progressing, 20)
        assert (await get(address, "/livez"))[0] == 200
        status, body = await get(address, "/progressz")
        assert status == 503
        assert json.loads(body)["still_seconds"] > 0.1
        status, body = await get(address, "/readyz")
        assert status == 503
        assert "frozen" in json.loads(body)["reasons"][0]
        pulse.progress = Progress(pending=True, tick=8)
        await until(lambda: running.health.is_progressing, 20)


async def test_what_a_service_lacks_is_a_reason_not_to_send_it_work_and_none_to_restart_it() -> None:
    pulse = Pulse()
    async with (
        server([], progress=lambda: pulse.progress, why_not_ready=pulse.why_not_ready) as running,
        watching(WatchedSettings(watch_port=0), watched(running.health)) as address,
        channel(running.address) as to_server,
    ):
        health = health_pb2_grpc.HealthStub(to_server)

        async def says(name: str) -> str:
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)
            return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

        async def until_readiness_is(wanted: str) -> None:
            async with asyncio.timeout(20):
                while await says(READINESS) != wanted:
                    await asyncio.sleep(0.05)

        await until_readiness_is("SERVING")
        pulse.lacks = ["redis: ConnectionError"]
        await until_readiness_is("NOT_SERVING")
        assert await says("") == "SERVING"
        status, body = await get(address, "/readyz")
        assert (status, json.loads(body)["reasons"]) == (503, ["redis: ConnectionError"])
        assert (await get(address, "/progressz"))[0] == 200
        pulse.lacks = ()
        await until_readiness_is("SERVING")


async def test_a_draining_service_is_not_ready() -> None:
    async with (
        server([]) as running,
        watching(WatchedSettings(watch_port=0), watched(running.health)) as address,
    ):
        await running.begin_drain()
        status, body = await get(address, "/readyz")
        assert status == 503
        assert "draining" in json.loads(body)["reasons"][0]
        assert (await get(address, "/livez"))[0] == 200


async def test_a_readiness_that_raises_is_a_reason() -> None:
    async def why_not_ready() -> Sequence[str]:
        raise ZeroDivisionError

    health = ServerHealth([], why_not_ready=why_not_ready)
    assert await health.why_not_ready() == ["unknown: ZeroDivisionError"]


async def test_everything_but_livez_asks_for_a_key_where_keys_are_configured() -> None:
    async with (
        server([]) as running,
        watching(WatchedSettings(watch_port=0), watched(running.health, keys=OneKey())) as address,
    ):
        assert (await get(address, "/livez"))[0] == 200
        for path in ("/readyz", "/progressz", "/metrics"):
            assert (await get(address, path))[0] == 401
            assert (await get(address, path, authorization="Bearer wrong"))[0] == 401
            assert (await get(address, path, authorization=f"Bearer {KEY.decode()}"))[0] == 200


async def test_metrics_are_in_prometheus_text_and_two_stacks_in_one_process_do_not_clash() -> None:
    registry = CollectorRegistry()
    Counter("fusionroute_test_things", "Things.", registry=registry).inc(3)
    load = EngineLoad(2, 1, 256, 40, 1000, 12, 5)
    refreshed: list[bool] = []

    async def refresh() -> None:
        refreshed.append(True)
        raise ZeroDivisionError  # must not cost the metrics that are there

    async with server([]) as running:
        for _ in range(2):
            exposition = Exposition(registry, [EngineCollector("fusionroute_test", lambda: [load, load])])
            async with watching(
                WatchedSettings(watch_port=0), Watched(running.health, exposition, refresh)
            ) as address:
                status, text = await get(address, "/metrics")
                assert status == 200
            samples = {
                sample.name: sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
            assert samples["fusionroute_test_things_total"] == 3
            assert samples["fusionroute_test_kv_tokens_used"] == 80
            assert samples["fusionroute_test_evictions_total"] == 10
            assert samples["process_resident_memory_bytes"] > 1e6
            assert not any(name.endswith("_created") for name in samples)
    assert len(refreshed) == 2


def test_a_counter_of_engines_goes_on_when_one_is_closed() -> None:
    loads = [EngineLoad(0, 0, 1, 0, 1, 10, 1), EngineLoad(0, 0, 1, 0, 1, 5, 0)]
    collector = EngineCollector("x", lambda: loads)

    def forwards() -> float:
        return next(family for family in collector.collect() if family.name == "x_forwards").samples[0].value

    assert forwards() == 15
    del loads[0]
    assert forwards() == 15
    loads[0] = EngineLoad(0, 0, 1, 0, 1, 7, 0)
    assert forwards() == 17


async def test_no_port_is_opened_unless_one_is_named() -> None:
    async with server([]) as running, watching(WatchedSettings(), watched(running.health)) as address:
        assert address is None


async def test_a_taken_watch_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with server([]) as running:
            with pytest.raises(PortTaken, match=f"127.0.0.1:{port}"):
                async with watching(WatchedSettings(watch_port=port), watched(running.health)):
                    pass


async def test_signals_stay_the_daemons_and_the_port_is_free_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    async with server([]) as running:
        async with watching(WatchedSettings(watch_port=0), watched(running.health)) as address:
            assert (await get(address, "/livez"))[0] == 200
            assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
        with pytest.raises(urllib.error.URLError):
            await get(address, "/livez")
