"""The watch port of the daemons as the programs they are."""

from __future__ import annotations

import asyncio
import signal
import socket
import urllib.request
from pathlib import Path

from fusionroute.settings import ExitCode
from tests.daemons import daemon
from tests.tiny_models import save_tiny_model


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:  # noqa: S310 - our own loopback address
        text: str = response.read().decode()
        return text


async def test_a_daemon_tells_its_watch_port_answers_there_and_stops_cleanly(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama", seed=1)
    async with daemon(
        "expert_service", tmp_path / "run", "--model", str(model), "--watch-port", "0"
    ) as expert:
        await expert.address()
        watch_address = expert.ready_file.read_text().splitlines()[1]
        assert '"ready":true' in await asyncio.to_thread(_read, f"http://{watch_address}/readyz")
        metrics = await asyncio.to_thread(_read, f"http://{watch_address}/metrics")
        assert "fusionroute_expert_kv_tokens_limit 65536.0" in metrics
        assert 'fusionroute_expert_registry_state{state="unregistered"} 1.0' in metrics
        expert.process.send_signal(signal.SIGTERM)
        await expert.output()
        assert expert.process.returncode == ExitCode.STOPPED


async def test_a_taken_watch_port_stops_the_start_with_its_exit_code(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        async with daemon("expert_service", tmp_path, "--model", "nowhere", "--watch-port", port) as expert:
            output = await expert.output()
            assert expert.process.returncode == ExitCode.PORT_TAKEN
            assert port in output
