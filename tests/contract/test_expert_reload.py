"""An expert that reloads its weights, and one that waits on standby: as its callers and its registry see it."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from expert_service.bootstrap import RunningExpert, running_expert
from expert_service.registrar import Registrar, Registration
from expert_service.settings import ExpertSettings
from fusionroute.engine import load_model
from fusionroute.errors import FusionRouteError, Reason
from fusionroute.grpc_runtime import channel, error_from_rpc, server
from fusionroute.v1 import common_pb2, expert_pb2, expert_pb2_grpc
from fusionroute.v1.registry_pb2 import EXPERT_STATE_DRAINING, EXPERT_STATE_READY, EXPERT_STATE_STANDBY
from fusionroute.wire import matrix_to_numpy
from tests import daemons
from tests.expert_fakes import MemoryRegistry, registry_service, until
from tests.tiny_models import WIDTH, save_tiny_model

TOKENS = [5, 9, 30]


@dataclass
class Served:
    """An expert, its folder and a stub."""

    folder: Path
    running: RunningExpert
    stub: Any

    async def row(self, session_id: str, **changes: Any) -> expert_pb2.StepResponse:
        request = expert_pb2.StepRequest(session_id=session_id, token_ids=TOKENS, num_rows=1, **changes)
        answer: expert_pb2.StepResponse = await self.stub.Step(request, timeout=30)
        return answer

    async def reload(self) -> expert_pb2.ReloadResponse:
        answer: expert_pb2.ReloadResponse = await self.stub.Reload(expert_pb2.ReloadRequest(), timeout=60)
        return answer

    async def info(self) -> expert_pb2.GetInfoResponse:
        answer: expert_pb2.GetInfoResponse = await self.stub.GetInfo(expert_pb2.GetInfoRequest())
        return answer


@asynccontextmanager
async def expert(folder: Path, **settings: Any) -> AsyncIterator[Served]:
    async with AsyncExitStack() as stack:
        loaded = load_model(str(folder))
        running = await stack.enter_async_context(
            running_expert(ExpertSettings(model=str(folder), slot="math", port=0, **settings), loaded)
        )
        del loaded
        opened = await stack.enter_async_context(channel(running.server.address))
        yield Served(folder, running, expert_pb2_grpc.ExpertServiceStub(opened))


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with expert(save_tiny_model(tmp_path / "model", seed=1)) as running:
        yield running


async def refusal(call: Any) -> FusionRouteError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value)


async def test_a_reload_serves_the_new_weights_under_a_higher_epoch_and_forgets_sessions(
    served: Served,
) -> None:
    before = await served.row("s")
    save_tiny_model(served.folder, seed=2)
    answer = await served.reload()
    assert answer.previous_epoch == before.epoch < answer.model.epoch
    assert (await served.info()).model == answer.model
    lost = await refusal(
        served.stub.Step(expert_pb2.StepRequest(session_id="s", from_position=3, token_ids=[1]))
    )
    assert lost.reason is Reason.SESSION_UNKNOWN
    old_epoch = await refusal(served.row("s", expected_epoch=before.epoch))
    assert old_epoch.reason is Reason.EPOCH_MISMATCH
    after = await served.row("s")
    assert after.epoch == answer.model.epoch
    assert abs(matrix_to_numpy(after.rows, WIDTH) - matrix_to_numpy(before.rows, WIDTH)).max() > 0.1


async def test_the_old_weights_are_freed_once_nobody_uses_them(served: Served) -> None:
    old = weakref.ref(served.running.engine.model.model)
    await served.row("s")
    await served.reload()

    def is_gone() -> bool:
        gc.collect()
        return old() is None

    await until(is_gone)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 50}, Reason.VOCABULARY_MISMATCH),
        ({"max_position_embeddings": 64}, Reason.MODEL_UNSUPPORTED),
        (None, Reason.MODEL_BROKEN),
    ],
)
async def test_a_refused_reload_changes_nothing(
    served: Served, changes: dict[str, Any] | None, reason: Reason
) -> None:
    before = await served.row("s")
    if changes is None:
        for path in served.folder.glob("*.safetensors"):
            path.unlink()  # the weights that serve are mapped from it
            path.write_bytes(b"no weights")
    else:
        save_tiny_model(served.folder, seed=2, **changes)
    error = await refusal(served.reload())
    assert error.reason is reason
    assert error.code.name == "FAILED_PRECONDITION"
    assert (await served.info()).model.epoch == before.epoch
    again = await served.row("s", expected_epoch=before.epoch)
    assert (again.epoch, again.num_computed_tokens) == (before.epoch, 1)
    assert abs(matrix_to_numpy(again.rows, WIDTH) - matrix_to_numpy(before.rows, WIDTH)).max() < 1e-4


async def test_a_second_reload_while_one_runs_is_refused(served: Served) -> None:
    first = asyncio.ensure_future(served.reload())
    await until(lambda: served.running.served._reloading is not None)
    error = await refusal(served.reload())
    assert error.reason is Reason.RELOADING
    assert error.code.name == "ABORTED"
    assert (await first).model.epoch == (await served.info()).model.epoch
    await served.reload()  # and now it may


async def test_a_call_that_has_begun_ends_with_the_weights_it_began_with(served: Served) -> None:
    before = await served.row("s")
    request = expert_pb2.ScoreRequest(sequences=[expert_pb2.TokenSequence(token_ids=TOKENS * 8)] * 40)
    scoring = served.stub.Score(request, timeout=60)
    epochs: set[int] = set()
    async for chunk in scoring:
        if not epochs:
            await served.reload()
        epochs.add(chunk.epoch)
    assert epochs == {before.epoch}


async def test_a_reload_is_registered_at_once(tmp_path: Path) -> None:
    registry = MemoryRegistry(lease_seconds=600)
    folder = save_tiny_model(tmp_path / "model", seed=1)
    async with (
        server([registry_service(registry)]) as router,
        expert(folder, router=router.address) as served,
    ):
        await until(lambda: len(registry.entries) == 1)
        answer = await served.reload()
        await until(lambda: [e.model.epoch for e in registry.entries.values()] == [answer.model.epoch], 20)
        assert len(registry.entries) == 1


MINE = Registration("math-1", "math", "127.0.0.1:7", common_pb2.ModelIdentity(name="m"), standby=True)


@asynccontextmanager
async def registering(*addresses: str) -> AsyncIterator[Registrar]:
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(channel(address)) for address in addresses]
        registrar = Registrar(channels, MINE, common_pb2.Load, most_backoff_seconds=0.3)
        yield await stack.enter_async_context(registrar)


async def test_a_beginning_drain_is_told_to_the_registry_at_once() -> None:
    registry = MemoryRegistry(lease_seconds=600)
    async with server([registry_service(registry)]) as router, registering(router.address) as registrar:
        await until(lambda: len(registry.entries) == 1)
        assert registry.heartbeats == []
        registrar.begin_drain()
        await until(lambda: [heartbeat.draining for heartbeat in registry.heartbeats] == [True])
    assert registry.entries == {}


async def test_another_router_is_found_when_one_does_not_answer() -> None:
    first, second = MemoryRegistry(), MemoryRegistry()
    async with (
        server([registry_service(second)]) as other,
        server([registry_service(first)], stop_grace_seconds=0.1) as router,
    ):
        async with registering(router.address, other.address):
            await until(lambda: "math-1" in first.entries)
            await router.stop(0.0)
            await until(lambda: "math-1" in second.entries)
            await until(lambda: len(second.heartbeats) > 1)
        assert second.entries == {}


@pytest.mark.parametrize(
    ("told", "standby"),
    [(EXPERT_STATE_STANDBY, True), (EXPERT_STATE_READY, False), (EXPERT_STATE_DRAINING, True)],
)
async def test_after_a_lost_registry_an_expert_serves_only_if_it_was_told_to(
    told: Any, standby: bool
) -> None:
    registry = MemoryRegistry(state=told)
    async with server([registry_service(registry)]) as router, registering(router.address):
        await until(lambda: len(registry.heartbeats) > 1)
        registry.entries.clear()
        await until(lambda: "math-1" in registry.entries)
        assert registry.entries["math-1"].standby is standby


async def test_an_expert_that_nobody_swaps_in_stops_by_itself(tmp_path: Path) -> None:
    registry = MemoryRegistry(state=EXPERT_STATE_STANDBY)
    model = str(save_tiny_model(tmp_path / "model"))
    async with server([registry_service(registry)]) as router:
        options = ("--model", model, "--slot", "math", "--router", router.address)
        waiting = ("--standby", "--standby-seconds", "0.5")
        async with daemons.daemon("expert_service", tmp_path, *options, *waiting) as waiting_in_vain:
            output = await waiting_in_vain.output()
        assert waiting_in_vain.process.returncode == 0, output
        assert {"standby_given_up", "deregistered", "stopped"} <= set(daemons.events(output))
        assert registry.entries == {}
        registry.state = EXPERT_STATE_READY
        async with daemons.daemon("expert_service", tmp_path, *options, *waiting) as swapped_in:
            await swapped_in.address()
            await until(lambda: len(registry.entries) == 1)
            await asyncio.sleep(1.0)
            assert swapped_in.process.returncode is None
