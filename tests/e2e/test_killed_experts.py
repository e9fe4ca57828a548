"""Real processes, killed with SIGKILL while they write: the text does not change."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest

from fusionroute.client import RouterClient
from fusionroute.v1.router_pb2 import GenerateRequest
from tests.daemons import Daemon, daemon
from tests.equivalence import assert_all_equal, assert_written_across_restarts, compare, make_cases
from tests.served_stack import Answer, Family, make_family


class Experts:
    """Expert daemons by slot, that can be killed and started again."""

    def __init__(self, family: Family, router: str, folder: Path, stack: AsyncExitStack) -> None:
        self.family, self.router, self.folder, self.stack = family, router, folder, stack
        self.running: dict[str, Daemon] = {}

    async def start(self, slot: str) -> None:
        model = str(self.family.experts[slot])
        options = ("--model", model, "--slot", slot, "--router", self.router)
        self.running[slot] = await self.stack.enter_async_context(
            daemon("expert_service", self.folder / slot, *options)
        )
        await self.running[slot].address()

    async def kill(self, slot: str) -> None:
        process = self.running.pop(slot).process
        process.kill()
        await process.communicate()


@pytest.mark.timeout(300)  # it starts experts again and again
async def test_experts_killed_and_restarted_in_mid_generation_change_nothing(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family")
    cases = make_cases(family.reference(), 80)
    async with AsyncExitStack() as stack:
        router = await stack.enter_async_context(
            daemon("router_service", tmp_path, "--checkpoint", str(family.router))
        )
        address = await router.address()
        client = await stack.enter_async_context(RouterClient.open(address))
        experts = Experts(family, address, tmp_path, stack)
        await asyncio.gather(*(experts.start(slot) for slot in family.experts))
        answers: list[Answer] = []

        async def answer(request: GenerateRequest) -> Answer:
            async with aclosing(client.generate(request, 120)) as events:
                got = await Answer.read(events)
            answers.append(got)
            return got

        async def kill_some(done: int) -> None:
            slot = {20: "math", 45: "strings"}.get(done)
            if slot is not None:
                await experts.kill(slot)
                await experts.start(slot)

        verdict = await compare(cases, answer, 16, kill_some)
        assert_all_equal(verdict, len(cases))
        assert_written_across_restarts(answers, family.experts)
