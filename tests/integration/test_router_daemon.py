"""The program `router-service`: serves, drains, and says by exit code and log what was wrong."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from fusionroute.client import RouterClient
from tests import daemons
from tests.daemons import START_SECONDS, Daemon, events
from tests.served_stack import SLOTS, Family, make_family


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


def daemon(tmp_path: Path, *options: str, **environment: str) -> AbstractAsyncContextManager[Daemon]:
    return daemons.daemon("router_service", tmp_path, *options, **environment)


async def ended(router: Daemon) -> tuple[int | None, dict[str, dict[str, str]]]:
    output = await router.output()
    return router.process.returncode, events(output)


async def test_a_router_serves_with_a_redis_of_its_own_and_stops_cleanly(
    tmp_path: Path, family: Family
) -> None:
    async with daemon(tmp_path, "--checkpoint", str(family.router)) as router:
        async with RouterClient.open(await router.address()) as client:
            info = await client.info()
            assert [slot.slot for slot in info.slots] == list(SLOTS)
        router.process.send_signal(signal.SIGTERM)
        code, log = await ended(router)
    assert code == 0
    assert {"private_redis", "ready", "draining", "stopped"} <= set(log)
    assert not Path(f"/proc/{log['private_redis']['pid']}").exists()


async def test_a_killed_router_takes_its_private_redis_with_it(tmp_path: Path, family: Family) -> None:
    async with daemon(tmp_path, "--checkpoint", str(family.router)) as router:
        await router.address()
        router.process.kill()
        _, log = await ended(router)
    redis = Path(f"/proc/{log['private_redis']['pid']}")
    async with asyncio.timeout(10):
        while redis.exists() and "Z" not in (redis / "stat").read_text().split()[2]:
            await asyncio.sleep(0.05)


async def test_an_unreachable_redis_is_exit_code_5_and_named_without_its_password(
    tmp_path: Path, family: Family
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        url = f"redis://:secret-word@127.0.0.1:{port}/0"
        async with daemon(tmp_path, "--checkpoint", str(family.router), REDIS_URL=url) as router:
            output = await router.output()
    assert router.process.returncode == 5
    assert f"127.0.0.1:{port}" in events(output)["redis_unreachable"]["message"]
    assert "secret-word" not in output


async def test_a_taken_port_is_exit_code_4_and_named(tmp_path: Path, family: Family) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        async with daemon(tmp_path, "--checkpoint", str(family.router), "--port", port) as router:
            code, log = await ended(router)
    assert code == 4
    assert f"127.0.0.1:{port}" in log["port_taken"]["message"]


async def test_a_missing_or_incomplete_checkpoint_is_exit_code_3_and_named(
    tmp_path: Path, family: Family
) -> None:
    expert = family.experts["math"]
    for folder, reason in ((tmp_path / "nowhere", "MODEL_NOT_FOUND"), (expert, "CHECKPOINT_INCOMPLETE")):
        async with daemon(tmp_path, "--checkpoint", str(folder)) as router:
            code, log = await ended(router)
        assert code == 3
        assert log["checkpoint_rejected"]["reason"] == reason
        assert str(folder) in log["checkpoint_rejected"]["message"]


async def test_a_bad_setting_is_exit_code_2_and_named(tmp_path: Path) -> None:
    async with daemon(tmp_path, "--checkpoint", "x", FUSIONROUTE_ROUTER_ALONE_SECONDS="-1") as router:
        output = await router.output()
    assert router.process.returncode == 2
    assert "alone_seconds = '-1' (from the environment variable FUSIONROUTE_ROUTER_ALONE_SECONDS)" in output


async def test_help_comes_without_loading_what_is_slow() -> None:
    slow = "{'torch', 'transformers', 'grpc'}"
    program = f"import sys, router_service.cli; sys.exit(', '.join({slow} & set(sys.modules)) or 0)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await asyncio.wait_for(process.communicate(), START_SECONDS)
    assert process.returncode == 0, errors.decode()
