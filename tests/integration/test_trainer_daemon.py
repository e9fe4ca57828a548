"""The program `trainer-service`: serves, drains, and says by exit code and log what was wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fusionroute.trainer_client import TrainerClient
from tests.daemons import START_SECONDS, Daemon, events


@asynccontextmanager
async def daemon(folder: Path, *options: str, **environment: str) -> AsyncIterator[Daemon]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FUSIONROUTE_") and name != "REDIS_URL"
    }
    ready_file = folder / "ready"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "trainer", "--port", "0", "--log-format", "json", "--ready-file", str(ready_file),
        "--jobs-dir", str(folder / "jobs"), "--checkpoints-dir", str(folder / "checkpoints"), *options,
        env=inherited | environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield Daemon(process, ready_file)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_a_trainer_serves_with_a_redis_of_its_own_is_healthy_and_stops_cleanly(tmp_path: Path) -> None:
    async with daemon(tmp_path) as trainer:
        address = await trainer.address()
        async with TrainerClient.open(address) as client:
            assert await client.list_jobs() == []
        async with grpc.aio.insecure_channel(address) as channel:
            request = health_pb2.HealthCheckRequest(service="fusionroute.v1.TrainerService")
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        trainer.process.send_signal(signal.SIGTERM)
        log = events(await trainer.output())
    assert trainer.process.returncode == 0
    assert {"private_redis", "ready", "draining", "stopped"} <= set(log)
    assert not Path(f"/proc/{log['private_redis']['pid']}").exists()
    assert not trainer.ready_file.exists()


async def test_an_unreachable_redis_is_exit_code_5_and_named_without_its_password(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        async with daemon(tmp_path, REDIS_URL=f"redis://:secret-word@127.0.0.1:{port}/0") as trainer:
            output = await trainer.output()
    assert trainer.process.returncode == 5
    assert f"127.0.0.1:{port}" in events(output)["redis_unreachable"]["message"]
    assert "secret-word" not in output


async def test_a_taken_port_is_exit_code_4_and_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        async with daemon(tmp_path, "--port", port) as trainer:
            output = await trainer.output()
    assert trainer.process.returncode == 4
    assert f"127.0.0.1:{port}" in events(output)["port_taken"]["message"]


async def test_bad_settings_are_exit_code_2_and_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for options, named in (
        (("--jobs-dir", str(tmp_path / "file")), "jobs_dir"),
        (("--job-heartbeat-seconds", "9"), "at most half of job_lease_seconds = 15"),
        (("--max-running-jobs", "0"), "max_running_jobs = '0' (from --max-running-jobs)"),
    ):
        async with daemon(tmp_path, *options) as trainer:
            output = await trainer.output()
        assert trainer.process.returncode == 2, output
        assert named in output


async def test_a_second_trainer_with_the_same_private_redis_is_refused(tmp_path: Path) -> None:
    async with daemon(tmp_path) as first:
        await first.address()
        async with daemon(tmp_path) as second:
            output = await second.output()
    assert second.process.returncode == 5
    assert "another private Redis uses" in events(output)["redis_unreachable"]["message"]


async def test_help_comes_without_loading_what_is_slow() -> None:
    slow = "{'torch', 'transformers', 'grpc', 'redis'}"
    program = f"import sys, trainer.cli; sys.exit(', '.join({slow} & set(sys.modules)) or 0)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await asyncio.wait_for(process.communicate(), START_SECONDS)
    assert process.returncode == 0, errors.decode()


async def test_neither_the_service_nor_a_jobs_process_loads_torch_before_a_run_does() -> None:
    program = "import sys, trainer.bootstrap, trainer.jobs.process; sys.exit(int('torch' in sys.modules))"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    assert await asyncio.wait_for(process.wait(), START_SECONDS) == 0
