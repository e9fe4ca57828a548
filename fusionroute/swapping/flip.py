"""The one step that changes who serves a slot, made once although calls may fail."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from fusionroute.errors import FusionRouteError, Reason, Unavailable
from fusionroute.swapping.parts import Parts, Policy, Step, SwapFailed, SwapRefused, ready
from fusionroute.v1.registry_pb2 import EXPERT_STATE_STANDBY, ExpertEntry


class FlipUnknown(SwapFailed):
    """The registry could not be asked whether the flip has happened, so nothing may be stopped."""


@dataclass(frozen=True, slots=True)
class Flipped:
    """What the registry decided.

    Attributes:
        epoch: of the slot from now on.
        retired: entries of those that drain now, as they were before.
    """

    epoch: int
    retired: tuple[ExpertEntry, ...]


async def flip(
    parts: Parts, slot: str, before: Sequence[ExpertEntry], new: ExpertEntry, *, keep: bool, policy: Policy
) -> Flipped:
    """Lets the new expert serve, instead of those before it or, with `keep`, beside them.

    Raises:
        SwapRefused: somebody else has changed who serves meanwhile.
        FlipUnknown: no answer within flip_seconds.
        FusionRouteError: the registry refused.
    """
    give_up = parts.clock() + parts.timing.flip_seconds
    chosen = [new.instance_id, *(entry.instance_id for entry in before if keep)]
    was_asked = False
    while True:
        try:
            listing = await parts.registry.list()
            if was_asked and any(e.instance_id == new.instance_id for e in ready(listing.experts, slot)):
                return _flipped(listing.experts, slot, before, new)
            _check_unchanged(listing.experts, slot, before, new)
            was_asked = True
            answer = await parts.registry.swap(slot, chosen, listing.revision, policy)
        except FusionRouteError as error:
            is_away = isinstance(error, Unavailable) and error.reason is not Reason.DRAINING
            if not is_away and error.reason is not Reason.REVISION_CONFLICT:
                raise
            if parts.clock() > give_up:
                kind = FlipUnknown if was_asked and is_away else SwapFailed
                raise kind(Step.FLIP, f"gave up: {error.message}") from error
            await asyncio.sleep(parts.timing.poll_seconds)
        else:
            retired = set(answer.retired_instance_ids)
            return Flipped(answer.epoch, tuple(entry for entry in before if entry.instance_id in retired))


def _check_unchanged(
    entries: Sequence[ExpertEntry], slot: str, before: Sequence[ExpertEntry], new: ExpertEntry
) -> None:
    def facts(served: Sequence[ExpertEntry]) -> set[tuple[str, str]]:
        return {(entry.instance_id, entry.model.weights_fingerprint) for entry in served}

    serving = facts(ready(entries, slot))
    if serving != facts(before):
        names = ", ".join(sorted(name for name, _ in serving)) or "nobody"
        raise SwapRefused(Step.FLIP, f"who serves slot {slot} has changed meanwhile: {names}")
    if not any(e.instance_id == new.instance_id and e.state == EXPERT_STATE_STANDBY for e in entries):
        raise SwapFailed(Step.FLIP, f"{new.instance_id} does not stand by any more")


def _flipped(
    entries: Sequence[ExpertEntry], slot: str, before: Sequence[ExpertEntry], new: ExpertEntry
) -> Flipped:
    """What must have been decided by a call whose answer was lost."""
    serving = {entry.instance_id: entry for entry in ready(entries, slot)}
    retired = tuple(entry for entry in before if entry.instance_id not in serving)
    return Flipped(serving[new.instance_id].epoch, retired)
