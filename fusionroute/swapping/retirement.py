"""Stopping experts that drain: not before their sessions have left them, and never the last one of a slot."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fusionroute.errors import FusionRouteError
from fusionroute.launching import LaunchFailed
from fusionroute.swapping.parts import Parts, Step
from fusionroute.v1.registry_pb2 import ExpertEntry


async def are_idle(parts: Parts, entries: Sequence[ExpertEntry]) -> bool:
    """Whether nobody has asked any of these experts for a while. One that does not answer is asked by nobody."""
    return all([await _is_idle(parts, entry) for entry in entries])


async def wait_until_idle(parts: Parts, entries: Sequence[ExpertEntry], give_up: float) -> bool:
    """Waits until the experts are idle or the clock says `give_up`. Returns whether they are."""
    while not (idle := await are_idle(parts, entries)) and parts.clock() < give_up:  # noqa: ASYNC110 - polls
        await asyncio.sleep(parts.timing.poll_seconds)
    return idle


async def stop_entry(parts: Parts, entry: ExpertEntry) -> bool:
    """Stops the expert of an entry. False, having said so, when that is not the launcher's to do."""
    try:
        launched = await asyncio.to_thread(parts.launcher.find, entry.address)
        if launched is None:
            what = f"{entry.instance_id} at {entry.address} drains, but was not started here: stop it where it was"
            parts.tell(Step.STOP, what)
            return False
        await asyncio.to_thread(parts.launcher.stop, launched, parts.timing.stop_seconds)
    except LaunchFailed as error:
        parts.tell(Step.STOP, f"{entry.instance_id} drains, but could not be stopped: {error}")
        return False
    parts.tell(Step.STOP, f"{entry.instance_id} has stopped")
    return True


async def _is_idle(parts: Parts, entry: ExpertEntry) -> bool:
    try:
        reached = await asyncio.to_thread(parts.launcher.reach, entry.address)
        async with parts.open_expert(reached) as expert:
            sessions = await expert.sessions()
    except (FusionRouteError, LaunchFailed):
        return True
    idle_seconds = parts.timing.idle_seconds
    return not any(session.busy or session.idle_seconds < idle_seconds for session in sessions)
