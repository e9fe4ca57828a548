"""Two routers over one Redis in one process: the first behind a network that can be cut, and at a pace of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusionroute.client import RouterClient
from fusionroute.v1.router_pb2 import GenerateRequest, SamplingParameters
from tests.expert_fakes import until
from tests.integration.lossy_proxy import LossyProxy
from tests.served_stack import Family, Stack, served

PROMPT = [5, 9, 11, 3]
GREEDY: dict[str, Any] = {}
SEEDED: dict[str, Any] = {"temperature": 1.5, "seed": 2**63 + 5}


class Pace:
    """How fast one router gets rows of its experts.

    Attributes:
        num_left: rows that still pass; None = all.
        seconds: each row waits for so long.
    """

    def __init__(self) -> None:
        self.num_left: int | None = None
        self.seconds = 0.0
        self.num_waiting = 0

    def hold(self, router: Stack) -> None:
        """Puts itself before the experts of a router's current checkpoint."""
        experts = router.router.served.current.ensemble.experts
        assert isinstance(experts, list)
        experts[:] = [_Paced(expert, self) for expert in experts]

    async def wait(self) -> None:
        await asyncio.sleep(self.seconds)
        self.num_waiting += 1
        try:
            while self.num_left == 0:
                await asyncio.sleep(0.005)
        finally:
            self.num_waiting -= 1
        if self.num_left is not None:
            self.num_left -= 1


class _Paced:
    """A model that is asked at a pace."""

    def __init__(self, model: Any, pace: Pace) -> None:
        self._model = model
        self._pace = pace

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    async def locate(self, *arguments: Any) -> Any:
        await self._pace.wait()
        return await self._model.locate(*arguments)


@dataclass
class Pair:
    """Two routers that share sessions and experts."""

    first: Stack
    second: Stack
    both: RouterClient
    network: LossyProxy
    """Between the first router and Redis."""
    pace: Pace
    """Of the first router's experts."""

    async def kill_first(self) -> None:
        """The first router is gone: its streams break, nothing of it reaches Redis any more."""
        self.network.is_down = True
        await self.first.router.keeper.drain(0.0)

    async def held_at(self, num_tokens: int, session_id: str) -> None:
        """Returns when the first router has stored so many tokens of an answer and waits for the next."""

        async def is_there() -> bool:
            stored = await self.second.client.get_session(session_id)
            return len(stored.token_ids) - stored.answer_position == num_tokens

        async with asyncio.timeout(20):
            while self.pace.num_waiting == 0 or not await is_there():
                await asyncio.sleep(0.02)


@asynccontextmanager
async def two_routers(
    family: Family, redis_url: str, folder: Path, second: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[Pair]:
    """Both routers within the context.

    Args:
        second: settings of the second router alone; `family` is its checkpoint's.
        settings: of both; unless they say otherwise leases of sessions last a second, and each token takes one row of
            an expert, so that `Pace` can count tokens.
    """
    settings = {"session_lease_seconds": 1.0, "early_asks": "off", "drafting": "off"} | settings
    own = {"redis_url": redis_url} | settings | (second or {})
    async with AsyncExitStack() as stack:
        network = await stack.enter_async_context(LossyProxy(redis_url, folder))
        a = await stack.enter_async_context(served(family, **({"redis_url": network.url} | settings)))
        b = await stack.enter_async_context(served(own.pop("family", family), start=False, **own))
        await until(lambda: all(b.router.directory.best(slot) for slot in family.experts), 20)
        addresses = f"{a.router.server.address},{b.router.server.address}"
        both = await stack.enter_async_context(RouterClient.open(addresses))
        pace = Pace()
        pace.hold(a)
        yield Pair(a, b, both, network, pace)
        network.is_down = network.is_mute = False
        pace.num_left = None


def ask(max_tokens: int, sampling: dict[str, Any] | None = None, **changes: Any) -> GenerateRequest:
    """A request for exactly so many tokens."""
    parameters = {"max_tokens": max_tokens, "ignore_eos": True} | (sampling or {})
    return GenerateRequest(token_ids={"ids": PROMPT}, sampling=SamplingParameters(**parameters), **changes)
