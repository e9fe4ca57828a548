"""A real Prometheus scrapes a real stack under load, and every expression of dashboard and alerts has data."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusionroute import local_stack, processes
from fusionroute.client import RouterClient, ask_registry
from fusionroute.local_stack import StackPlan
from fusionroute.stack_state import StackState
from fusionroute.v1.router_pb2 import ON_EXPERT_UNAVAILABLE_NEXT_BEST, GenerateRequest
from tests.monitoring_expressions import RULES, alert_measures, dashboard_expressions
from tests.served_stack import make_family

pytestmark = [pytest.mark.prometheus, pytest.mark.timeout(900)]

SLOTS = ("math", "strings")
LOAD_SECONDS = 20.0


def binary(name: str) -> str:
    """Of Prometheus: on PATH, or in the folder that PROMETHEUS_BIN names."""
    found = shutil.which(
        name, path=os.pathsep.join([os.environ.get("PROMETHEUS_BIN", ""), os.environ["PATH"]])
    )
    assert found is not None, f"{name} is not there; put it on PATH or name its folder by PROMETHEUS_BIN"
    return found


@contextmanager
def stack(folder: Path) -> Iterator[StackState]:
    family = make_family(folder / "models", SLOTS)
    plan = StackPlan(
        router_checkpoint=str(family.router),
        experts={slot: str(path) for slot, path in family.experts.items()},
        port=0,
        isolated=True,
        trainer=True,
        watch=True,
    )
    state = local_stack.start(plan, folder / "stack", ask_registry=ask_registry, die_with_parent=True)
    try:
        yield state
    finally:
        local_stack.stop(folder / "stack", 10.0)


@contextmanager
def prometheus(folder: Path, targets: Path) -> Iterator[str]:
    """Its URL, while it scrapes the targets every second."""
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        f"rule_files: [{RULES}]\n"
        f"scrape_configs:\n  - job_name: any\n    file_sd_configs: [{{files: [{targets}], refresh_interval: 1s}}]\n"
    )
    subprocess.run([binary("promtool"), "check", "config", str(config)], check=True, capture_output=True)
    port = local_free_port()
    process = subprocess.Popen(
        [binary("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}",
         f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"],
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(f"{url}/-/ready"), 60)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def local_free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - our own loopback address
            return True
    except OSError:
        return False


def wait_until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def query(url: str, expression: str) -> list[float]:
    """The values of an instant query; raises for what Prometheus does not understand."""
    address = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(address, timeout=20) as response:  # noqa: S310 - our own loopback address
        answer = json.load(response)
    assert answer["status"] == "success", answer
    return [float(sample["value"][1]) for sample in answer["data"]["result"]]


async def load(state: StackState, seconds: float) -> int:
    """Answers for so long, several at a time, and a request that is refused; the number of answers."""
    num_answers, until = 0, time.monotonic() + seconds
    async with RouterClient.open(state.router_address) as client:

        async def one(index: int) -> None:
            nonlocal num_answers
            while time.monotonic() < until:
                request = GenerateRequest(
                    token_ids={"ids": [2 + index, 5, 9, 11]},
                    sampling={"max_tokens": 24, "ignore_eos": True, "seed": num_answers},
                    on_expert_unavailable=ON_EXPERT_UNAVAILABLE_NEXT_BEST,
                )
                async with aclosing(client.generate(request, 120)) as events:
                    async for _ in events:
                        pass
                num_answers += 1

        await asyncio.gather(*(one(index) for index in range(4)))
    return num_answers


def test_every_expression_of_dashboard_and_alerts_has_data(tmp_path: Path) -> None:
    with stack(tmp_path) as state, prometheus(tmp_path, tmp_path / "stack" / local_stack.TARGETS_FILE) as url:
        assert asyncio.run(load(state, LOAD_SECONDS)) > 4
        victim = next(record for record in state.processes if record.name == "expert-math")
        pid = processes.find(victim)
        assert pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        asyncio.run(load(state, LOAD_SECONDS))
        measures = [*dashboard_expressions("2m"), *alert_measures()]
        found = {expression: query(url, expression) for expression in measures}
        degraded = sum(query(url, "fusionroute_router_degraded_tokens_total"))
        down = query(url, 'ALERTS{alertname="TargetDown"}')
        if (pause := float(os.environ.get("MONITORING_PAUSE_SECONDS", "0"))) > 0:
            print(f"Prometheus is at {url} for {pause:g} s")
            time.sleep(pause)
    empty = [expression for expression, values in found.items() if not values]
    undefined = [e for e, values in found.items() if values and all(math.isnan(value) for value in values)]
    print(f"{len(measures)} expressions; without a number: {undefined}; degraded tokens: {degraded:g}")
    assert empty == []
    assert len(undefined) <= len(measures) // 10
    assert degraded > 0
    assert down, "the killed expert raises an alert"
