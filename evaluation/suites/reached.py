"""Routers that a suite asks: the one it is run against, and those that single systems name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from evaluation.suites.config import SystemTable
from evaluation.systems.ways import Way, rule_names
from fusionroute.client import RouterClient
from fusionroute.errors import Reason, Unavailable

EXPERTS_SECONDS = 60.0
EXPERTS_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Reached:
    """A router that answers.

    Attributes:
        address: HOST:PORT; "" for the router that the suite is run against.
        slots: of its checkpoint.
        rules: that it can serve, as requests name them.
        models: who answers: the router's checkpoint and the experts' models.
    """

    address: str
    client: RouterClient
    slots: tuple[str, ...]
    rules: tuple[str, ...]
    models: Mapping[str, Any]


@asynccontextmanager
async def reached_routers(
    router: RouterClient, systems: Sequence[SystemTable]
) -> AsyncIterator[dict[str, Reached]]:
    """By address: the router of the suite under "", then those that systems name.

    Raises:
        FusionRouteError: a router does not answer, or has a slot without an expert.
    """
    addresses = dict.fromkeys(table.address for table in systems if table.address)
    async with AsyncExitStack() as opened:
        found = {"": await _reach("", router)}
        for address in addresses:
            client = await opened.enter_async_context(RouterClient.open(address))
            found[address] = await _reach(address, client)
        yield found


def way_of(table: SystemTable) -> Way:
    """How the router is asked for a system."""
    return Way(table.name, table.label or table.name, table.combine, table.expert, table.random_expert)


async def _reach(address: str, client: RouterClient) -> Reached:
    info = await client.info()
    slots = tuple(slot.slot for slot in info.slots)
    models = {"checkpoint": info.checkpoint, "experts": await _serving(client, slots)}
    return Reached(address, client, slots, tuple(rule_names(info.available_combine)), models)


async def _serving(router: RouterClient, slots: Sequence[str]) -> dict[str, str]:
    """The model of each slot's expert, once all are there: whose answers these are must not depend on a late lease.

    Raises:
        Unavailable: a slot has nobody.
    """
    deadline = time.monotonic() + EXPERTS_SECONDS
    while True:
        experts = {each.slot: each.model for each in await router.experts() if each.state == "ready"}
        missing = [slot for slot in slots if slot not in experts]
        if not missing:
            return {slot: experts[slot] for slot in slots}
        if time.monotonic() > deadline:
            raise Unavailable(
                Reason.EXPERT_UNAVAILABLE,
                f"nobody serves slot {', '.join(missing)} after {EXPERTS_SECONDS:g} s",
                retry_after_seconds=1.0,
            )
        await asyncio.sleep(EXPERTS_POLL_SECONDS)
