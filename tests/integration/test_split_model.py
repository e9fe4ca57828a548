"""A model split over two processes on CPUs (gloo): the rows of one process, and an end for all when one ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fusionroute.engine import Engine, EngineLimits, StepCall, load_model
from fusionroute.errors import Reason
from fusionroute.grpc_runtime import channel, error_from_rpc
from fusionroute.v1 import expert_pb2, expert_pb2_grpc
from fusionroute.wire import matrix_to_numpy
from tests.daemons import START_SECONDS, events
from tests.expert_fakes import until
from tests.tiny_models import WIDTH, save_tiny_model

TOLERANCE = 1e-5
"""Sums over two processes are added in another order; the largest difference seen in float32 is 1e-6."""


def options(size: int) -> list[str]:
    return ["--threads", "1", "--log-format", "json", "--port", "0", "--tensor-parallel", str(size)]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@asynccontextmanager
async def program(*command: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FUSIONROUTE_")}
    process = await asyncio.create_subprocess_exec(
        *command,
        env=inherited | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(20):
                    await process.communicate()
            except TimeoutError:
                process.kill()
                await process.communicate()


async def ended(process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(START_SECONDS):
        output, _ = await process.communicate()
    return output.decode()


async def ready(process: asyncio.subprocess.Process, ready_file: Path) -> str:
    await until(lambda: ready_file.exists() or process.returncode is not None, START_SECONDS)
    assert process.returncode is None, await ended(process)
    return ready_file.read_text().strip()


@asynccontextmanager
async def ranks(folder: Path, model: Path, size: int) -> AsyncIterator[list[asyncio.subprocess.Process]]:
    """The processes with what torchrun would tell them, but without torchrun, which would end one after the other."""
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "expert_service", "--model", str(model), *options(size)]
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                program(
                    *command,
                    "--ready-file",
                    str(folder / "ready"),
                    **world,
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                )
            )
            for rank in range(size)
        ]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "gemma2", max_position_embeddings=4096)


def steps() -> list[dict[str, Any]]:
    """Prefills in chunks, ragged decoding, a rollback, much growth, sessions that begin anew, a shared prompt."""
    prompts = {
        f"s{number}": [2 + (7 * number + 3 * at) % 50 for at in range(9 + number)] for number in range(3)
    }
    calls = [
        {"session_id": name, "from_position": 0, "token_ids": ids, "num_rows": 2}
        for name, ids in prompts.items()
    ]
    for at in range(4):
        for name, ids in prompts.items():
            calls.append(
                {"session_id": name, "from_position": len(ids) + at, "token_ids": [5 + at], "num_rows": 1}
            )
    calls.append({"session_id": "s1", "from_position": 6, "token_ids": [9, 8, 7], "num_rows": 3})
    calls.append({"session_id": "s1", "from_position": 9, "token_ids": [3, 4] * 40, "num_rows": 1})
    calls.append({"session_id": "s0", "from_position": 0, "token_ids": [8, *prompts["s0"]], "num_rows": 1})
    calls.append({"session_id": "s2", "from_position": 0, "token_ids": prompts["s1"], "num_rows": 1})
    system = [2 + (11 * at) % 50 for at in range(300)]  # long enough to be shared
    for name in ("first", "second", "third"):
        calls.append(
            {"session_id": name, "from_position": 0, "token_ids": [*system, len(name)], "num_rows": 1}
        )
    calls.append({"session_id": "second", "from_position": 301, "token_ids": [4], "num_rows": 1})
    calls.append({"session_id": "third", "from_position": 100, "token_ids": [6], "num_rows": 1})
    return calls


async def test_rows_of_two_processes_under_torchrun_equal_those_of_one(
    tmp_path: Path, model_folder: Path
) -> None:
    ready_file = tmp_path / "ready"
    limits = EngineLimits(prefill_chunk_tokens=4)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
        *("--no-python", sys.executable, "-m", "expert_service", *options(2)),
        *("--model", str(model_folder), "--prefill-chunk-tokens", "4"),
        *("--ready-file", str(ready_file)),
    ]
    whole = load_model(str(model_folder))
    async with program(*command) as processes, Engine(whole, limits) as engine:
        async with channel(await ready(processes, ready_file)) as opened:
            stub = expert_pb2_grpc.ExpertServiceStub(opened)
            identity = (await stub.GetInfo(expert_pb2.GetInfoRequest())).model
            assert identity.weights_fingerprint == whole.facts.weights_fingerprint
            for call in steps():
                if call["from_position"] == 0:  # its memory is given back in all processes, and taken again
                    closing = expert_pb2.CloseSessionRequest(session_id=call["session_id"])
                    await stub.CloseSession(closing, timeout=20)
                    await engine.close_session(call["session_id"])
                wanted = (await engine.step(StepCall(**call))).rows.numpy()
                got = await stub.Step(expert_pb2.StepRequest(**call), timeout=20)
                rows = matrix_to_numpy(got.rows, WIDTH)
                assert rows.shape == wanted.shape
                assert np.abs(rows - wanted).max() < TOLERANCE, call
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Reload(expert_pb2.ReloadRequest(), timeout=20)
            assert error_from_rpc(refused.value).reason is Reason.MODEL_UNSUPPORTED
        processes.send_signal(signal.SIGTERM)
        output = await ended(processes)
    log = [line for line in output.splitlines() if '"event": "stopped"' in line]
    assert len(log) == 2, output  # process 0, and the other at its farewell
    assert "process_lost" not in output


async def test_a_process_that_is_killed_fails_the_steps_and_ends_the_one_that_serves(
    tmp_path: Path, model_folder: Path
) -> None:
    async with ranks(tmp_path, model_folder, 2) as (lead, killed):
        async with channel(await ready(lead, tmp_path / "ready")) as opened:
            stub = expert_pb2_grpc.ExpertServiceStub(opened)
            step = expert_pb2.StepRequest(session_id="s", token_ids=[3] * 3000, num_rows=1)
            running = asyncio.ensure_future(stub.Step(step, timeout=30))
            async with asyncio.timeout(10):
                while (await stub.GetInfo(expert_pb2.GetInfoRequest())).load.queue_depth == 0:
                    await asyncio.sleep(0.005)
            killed.kill()
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await running
            assert error_from_rpc(failed.value).reason is Reason.EXPERT_UNAVAILABLE
        output = await ended(lead)
    assert lead.returncode == 6, output
    assert "process 1 of the model has ended" in events(output)["process_lost"]["message"]
