"""Loading the weights of experts anew where they run, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.swapping.parts import Parts, Step, SwapFailed, of_slot
from fusionroute.v1.expert_pb2 import ReloadResponse
from fusionroute.v1.registry_pb2 import DRAIN_POLICY_MIGRATE, EXPERT_STATE_READY, ExpertEntry


async def reload_instances(
    parts: Parts, entries: Sequence[ExpertEntry], timeout_seconds: float
) -> list[ReloadResponse]:
    """Reloads the instances and returns once those that served their slot serve it again, all of them.

    The first one with new weights takes the slot over, so the others drain until they have the same.

    Raises:
        FusionRouteError: an expert refused; those before it have been reloaded.
        SwapFailed: the registry did not hear of it in time.
    """
    answers = []
    for entry in entries:
        reached = await asyncio.to_thread(parts.launcher.reach, entry.address)
        async with parts.open_expert(reached) as expert:
            parts.tell(Step.SERVE, f"{entry.instance_id} loads its weights anew")
            answers.append(await expert.reload(timeout_seconds))
    served = [entry.instance_id for entry in entries if entry.state == EXPERT_STATE_READY]
    loaded = {entry.instance_id: answer.model.epoch for entry, answer in zip(entries, answers, strict=True)}
    await _until_known(parts, loaded)
    if served:
        await _serve_again(parts, entries[0].slot, served)
    return answers


async def _until_known(parts: Parts, loaded: dict[str, int]) -> None:
    give_up = parts.clock() + parts.timing.register_seconds
    while True:
        known = {entry.instance_id: entry.model.epoch for entry in (await parts.registry.list()).experts}
        missing = [name for name, epoch in loaded.items() if known.get(name, 0) < epoch]
        if not missing:
            return
        if parts.clock() > give_up:
            raise SwapFailed(Step.REGISTER, f"{', '.join(missing)}: the registry has not heard of the reload")
        await asyncio.sleep(parts.timing.poll_seconds)


async def _serve_again(parts: Parts, slot: str, served: Sequence[str]) -> None:
    """Those that drain only because another one was reloaded first serve again."""
    give_up = parts.clock() + parts.timing.flip_seconds
    while True:
        listing = await parts.registry.list()
        here = {entry.instance_id: entry for entry in of_slot(listing.experts, slot)}
        living = [name for name in served if name in here]
        if all(here[name].state == EXPERT_STATE_READY for name in living):
            return
        try:
            await parts.registry.swap(slot, living, listing.revision, DRAIN_POLICY_MIGRATE)
        except FusionRouteError as error:
            if error.reason is not Reason.REVISION_CONFLICT or parts.clock() > give_up:
                raise
            await asyncio.sleep(parts.timing.poll_seconds)
