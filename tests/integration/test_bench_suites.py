"""The suites of `fusionroute bench` on a real stack of tiny models: what they count, and that they count it right."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from evaluation.bench_decode import measure_decode
from evaluation.bench_experts import measure_experts
from evaluation.bench_http import APIS, measure_http
from evaluation.bench_prefix import measure_prefix
from evaluation.bench_report import Report
from evaluation.bench_rules import measure_rules
from evaluation.bench_served import ServedStack, ServedTurn
from evaluation.bench_speculation import DRAFTERS, PLAIN, Workload, findings, measure_workload, table
from evaluation.bench_throughput import measure_throughput
from evaluation.bench_wire import KINDS, measure_wire
from fusionroute.errors import FusionRouteError
from fusionroute.v1.router_pb2 import GenerateRequest
from tests.served_stack import Family, make_family, served
from tests.tiny_models import WIDTH

TIME = {"num_tokens": 6, "num_runs": 1, "threads": 1}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), ("math", "strings"))


class WatchedStack(ServedStack):
    """Remembers the sessions that were opened."""

    def __init__(self, *facts) -> None:
        super().__init__(*facts)
        self.seen: list[str] = []

    async def turn(self, request: GenerateRequest) -> ServedTurn:
        turn = await super().turn(request)
        self.seen.append(turn.session_id)
        return turn


@asynccontextmanager
async def stack_of(family: Family, **router) -> AsyncIterator[WatchedStack]:
    """The family's stack as a benchmark sees it; all of its processes are this one."""
    async with served(family, **router) as stack:
        entries = await stack.client.list_experts()
        yield WatchedStack(
            stack.client,
            str(family.router),
            {slot: str(path) for slot, path in family.experts.items()},
            {"router": [os.getpid()]},
            {f"expert-{entry.slot}": entry.address for entry in entries},
        )


def prompts(number: int, length: int = 6) -> list[int]:
    return [2 + (7 * place + 13 * number) % (WIDTH - 2) for place in range(length)]


def medians(report: Report) -> dict[str, float]:
    return {finding.what: finding.value.median for finding in report.findings}


async def test_every_suite_measures_a_stack_and_forgets_its_sessions(family: Family) -> None:
    async with stack_of(family, early_asks="off") as stack:
        decode = medians(await measure_decode(stack, stack, prompts, **TIME))
        assert [value for what, value in decode.items() if "ids" in what] == [1.0] * 4

        rules = medians(await measure_rules(stack, prompts, **TIME, prompts_per_run=2, ignore_eos=True))
        assert rules["expert calls per token, sum"] == 1.0
        assert rules["expert calls per token, router"] == 0.0

        throughput = await measure_throughput({"float32": stack}, prompts, **TIME, sessions=(1, 3))
        assert [row[:2] for row in throughput.tables[0].rows] == [
            ["float32, routed", 1], ["float32, routed", 3], ["float32, one expert", 1], ["float32, one expert", 3],
        ]  # fmt: skip
        runs = throughput.runs["throughput"]
        assert runs["float32, routed, 3 sessions"].num_tokens == [18]

        experts = await measure_experts({2: stack, 3: stack}, prompts, **TIME)
        assert len(experts.tables[1].rows) == 2

        prefix = medians(await measure_prefix(stack, prompts, **TIME, prefix_tokens=30))
        assert prefix["ids of the same prompt again equal to the first ones"] == 1.0

        assert len(stack.seen) > 30
        for session_id in stack.seen:
            with pytest.raises(FusionRouteError, match="was deleted"):
                await stack.router.get_session(session_id)


async def test_drafted_texts_are_compared_with_plain_ones(family: Family) -> None:
    workload = Workload("tiny", prompts, num_tokens=8, num_sessions=2, temperature=0.8)
    async with stack_of(family) as stack:
        outcome = await measure_workload(stack, stack, workload, num_runs=1)
    assert [len(turn.ids) for turn in outcome.turns[PLAIN][0]] == [8, 8]
    assert [finding.is_met for finding in findings(outcome) if "ids" in finding.what] == [True]
    assert [row[0] for row in table(outcome).rows] == [PLAIN, *DRAFTERS]
    outcome.turns["router"][0][1].ids[4] += 1
    wrong = next(finding for finding in findings(outcome) if "ids" in finding.what)
    assert wrong.value.median == 0.5
    assert wrong.is_met is False


async def test_the_wire_is_measured_in_every_way_and_rows_are_the_same(family: Family) -> None:
    async with stack_of(family) as stack:
        report = await measure_wire({"float32": stack}, prompts(1), num_runs=1, threads=1, steps=3)
    rows = {row[0]: row for row in report.tables[0].rows}
    assert list(rows) == [f"float32, {kind}" for kind in KINDS]
    sizes = {name: int(row[-1] or 0) for name, row in rows.items()}
    for way in ("stream", "socket"):
        assert sizes[f"float32, {way}, shared memory"] < 4 * WIDTH < sizes[f"float32, {way}"]
    assert medians(report)["runs with the same best ids in every way, float32"] == 1.0
    rows_of_runs = report.runs["wire"]
    assert all(each.num_tokens == [3] for each in rows_of_runs.values())


async def test_http_is_measured_beside_grpc_and_writes_the_same(family: Family) -> None:
    async with served(family, http_port=0) as running:
        assert running.router.http_url is not None
        stack = ServedStack(
            running.client, str(family.router), {}, {"router": [os.getpid()]},
            http_urls={"router": running.router.http_url},
        )  # fmt: skip
        report = await measure_http(stack, lambda number: f"w{2 + number}", **TIME, sessions=(1, 2))
    same = [finding for finding in report.findings if "same texts" in finding.what]
    assert [finding.is_met for finding in same] == [True] * 2 * len(APIS)
    assert {name: each.num_tokens for name, each in report.runs["http"].items() if "2 sessions" in name} == {
        "gRPC, Generate, 2 sessions": [12],
        "HTTP, /v1/completions, 2 sessions": [12],
        "HTTP, /generate_stream, 2 sessions": [12],
    }
