"""The program `expert-service`: ready line, drain on SIGTERM, exit codes that say what was wrong."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest

from fusionroute.errors import Reason
from fusionroute.grpc_runtime import channel, error_from_rpc, server
from fusionroute.v1 import expert_pb2, expert_pb2_grpc
from tests import daemons
from tests.daemons import START_SECONDS, Daemon, events
from tests.expert_fakes import MemoryRegistry, registry_service, until
from tests.tiny_models import save_tiny_model

LONG = 2000


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


def daemon(tmp_path: Path, *options: str) -> AbstractAsyncContextManager[Daemon]:
    return daemons.daemon("expert_service", tmp_path, *options)


async def test_a_daemon_registers_serves_drains_and_leaves(tmp_path: Path, model_folder: Path) -> None:
    registry = MemoryRegistry()
    async with (
        server([registry_service(registry)]) as router,
        daemon(
            tmp_path, "--model", str(model_folder), "--slot", "math", "--router", router.address
        ) as expert,
    ):
        address = await expert.address()
        await until(lambda: [entry.address for entry in registry.entries.values()] == [address])
        async with channel(address) as opened:
            stub = expert_pb2_grpc.ExpertServiceStub(opened)
            step = expert_pb2.StepRequest(session_id="s", token_ids=[3] * LONG, num_rows=1)
            running = asyncio.ensure_future(stub.Step(step, timeout=60))
            await until_info(stub, lambda info: info.load.queue_depth > 0)
            expert.process.send_signal(signal.SIGTERM)
            late = await refused_as_draining(stub)
            assert late.reason is Reason.DRAINING
            assert (await running).position == LONG
        output = await expert.output()
        assert expert.process.returncode == 0, output
        assert registry.entries == {}
    assert f"ready on {address}\n" in output
    log = events(output)
    assert log["ready"]["address"] == address
    assert {"draining", "deregistered", "stopped"} <= set(log)
    assert not expert.ready_file.exists()


async def until_info(stub: Any, condition: Callable[[expert_pb2.GetInfoResponse], bool]) -> None:
    """Asks for the expert's state until it is as wanted."""
    async with asyncio.timeout(10):
        while not condition(await stub.GetInfo(expert_pb2.GetInfoRequest())):
            await asyncio.sleep(0.005)


async def refused_as_draining(stub: Any) -> Any:
    """The first refusal of a step of a new session."""
    give_up = time.monotonic() + 10
    number = 0
    while time.monotonic() < give_up:
        number += 1
        try:
            await stub.Step(expert_pb2.StepRequest(session_id=f"n{number}", token_ids=[3]), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error_from_rpc(error)
    raise TimeoutError("no step was refused")


async def test_a_second_signal_stops_a_drain_at_once(tmp_path: Path, model_folder: Path) -> None:
    async with (
        daemon(tmp_path, "--model", str(model_folder), "--drain-seconds", "300") as expert,
        channel(await expert.address()) as opened,
    ):
        stub = expert_pb2_grpc.ExpertServiceStub(opened)
        requests = [
            expert_pb2.StepRequest(session_id=f"s{index}", token_ids=[3] * LONG, num_rows=1)
            for index in range(16)
        ]
        steps = [asyncio.ensure_future(stub.Step(request)) for request in requests]
        await until_info(stub, lambda info: info.load.queue_depth == 16)
        expert.process.send_signal(signal.SIGTERM)
        await until_info(stub, lambda info: info.draining)
        expert.process.send_signal(signal.SIGTERM)
        output = await expert.output()
        outcomes = await asyncio.gather(*steps, return_exceptions=True)
    assert expert.process.returncode == -signal.SIGTERM
    assert any(isinstance(outcome, grpc.aio.AioRpcError) for outcome in outcomes)
    assert "stopped" not in events(output)
    assert "second signal" in events(output)["draining"]["note"]


async def test_a_taken_port_is_exit_code_4_and_named(tmp_path: Path, model_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        async with daemon(tmp_path, "--model", str(model_folder), "--port", port) as expert:
            output = await expert.output()
    assert expert.process.returncode == 4
    assert f"127.0.0.1:{port}" in events(output)["port_taken"]["message"]
    assert "loading" not in events(output), "found out only after the model was loaded"
    assert not expert.ready_file.exists()


async def test_a_missing_model_is_exit_code_3_and_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    async with daemon(tmp_path, "--model", missing) as expert:
        output = await expert.output()
    assert expert.process.returncode == 3
    rejected = events(output)["model_rejected"]
    assert rejected["reason"] == "MODEL_NOT_FOUND"
    assert missing in rejected["message"]


async def test_a_missing_device_is_exit_code_2_and_named(tmp_path: Path, model_folder: Path) -> None:
    async with daemon(tmp_path, "--model", str(model_folder), "--device", "cuda:99") as expert:
        output = await expert.output()
    assert expert.process.returncode == 2
    assert "device = 'cuda:99'" in events(output)["device_missing"]["message"]


async def test_help_comes_without_loading_what_is_slow() -> None:
    slow = "{'torch', 'transformers', 'grpc'}"
    program = f"import sys, expert_service.cli; sys.exit(', '.join({slow} & set(sys.modules)) or 0)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await asyncio.wait_for(process.communicate(), START_SECONDS)
    assert process.returncode == 0, errors.decode()


async def test_a_bad_setting_is_exit_code_2_and_named(tmp_path: Path) -> None:
    async with daemon(tmp_path, "--model", "m", "--kv-tokens", "none") as expert:
        output = await expert.output()
    assert expert.process.returncode == 2
    assert "kv_tokens = 'none' (from --kv-tokens)" in output
