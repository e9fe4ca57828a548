"""Another model for a slot, or one more expert for it, while answers are being written.

    start on standby -> fits? -> registered -> warm up -> canary -> FLIP -> sessions leave the old one -> stop it
    \\________ anything wrong, or Ctrl-C: the new one is stopped, the old one untouched ________/

After the flip the old expert is stopped only while another one serves the slot. A new one that dies before that makes
way for the old one again; if somebody else rolls the swap back, it is the new one that is stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from fusionroute.errors import FusionRouteError, Unavailable
from fusionroute.launching import Launch, LaunchFailed
from fusionroute.swapping.canary import Canary, Comparison
from fusionroute.swapping.flip import Flipped, FlipUnknown, flip
from fusionroute.swapping.parts import Parts, Policy, Step, SwapFailed, of_slot, ready
from fusionroute.swapping.retirement import are_idle, stop_entry, wait_until_idle
from fusionroute.swapping.trial import Trial, rival_of
from fusionroute.v1.registry_pb2 import ExpertEntry

CLEAN_UP_SECONDS = 10.0


class Outcome(Enum):
    """What a swap has come to."""

    SWAPPED = "swapped"
    ROLLED_BACK = "rolled back"
    ADDED = "added"


@dataclass(frozen=True, slots=True)
class SwapReport:
    """A swap that has come to its end.

    Attributes:
        instance_id: of the new expert.
        epoch: of the slot.
        retired: instances that served before.
        stopped: those that were stopped.
        comparison: by the canary, if there was one.
    """

    outcome: Outcome
    slot: str
    instance_id: str
    epoch: int
    retired: tuple[str, ...] = ()
    stopped: tuple[str, ...] = ()
    comparison: Comparison | None = None


class Swap:
    """One swap.

    Args:
        parts: what it is made with.
        launch: the new expert.
        policy: what becomes of running turns of the old one.
        canary: how to compare; None = not.
        keep: the old ones go on serving: the new one, of equal weights, is added to them.
    """

    def __init__(
        self, parts: Parts, launch: Launch, policy: Policy, canary: Canary | None, *, keep: bool = False
    ) -> None:
        self._parts, self._launch, self._policy, self._keep = parts, launch, policy, keep
        self._slot = launch.slot
        self._trial = Trial(parts, launch, canary, equal_weights=keep)
        self._new: ExpertEntry | None = None

    async def run(self) -> SwapReport:
        """All steps.

        Raises:
            SwapFailed: naming the step, and saying what serves now.
            FusionRouteError: the registry refused, or is not there.
        """
        entries = of_slot((await self._parts.registry.list()).experts, self._slot)
        before = ready(entries, self._slot)
        try:
            self._new = await self._trial.run(rival_of(entries, before))
            flipped = await flip(
                self._parts, self._slot, before, self._new, keep=self._keep, policy=self._policy
            )
        except FlipUnknown:
            raise
        except BaseException:
            await self._undo(before)
            raise
        self._parts.tell(
            Step.FLIP, f"{self._new.instance_id} serves slot {self._slot}, epoch {flipped.epoch}"
        )
        return await self._after(self._new, flipped)

    async def _undo(self, before: Sequence[ExpertEntry]) -> None:
        """The new expert is stopped; if the flip has happened after all, those before it serve again first."""
        new = self._new
        if new is not None:
            try:
                async with asyncio.timeout(CLEAN_UP_SECONDS):
                    listing = await self._parts.registry.list()
                    if any(
                        each.instance_id == new.instance_id for each in ready(listing.experts, self._slot)
                    ):
                        await self._parts.registry.roll_back(self._slot, listing.revision, self._policy)
            except (FusionRouteError, TimeoutError) as error:
                names = ", ".join(entry.instance_id for entry in before)
                self._parts.tell(
                    Step.FLIP, f"look whether {names or 'nobody'} serves: {str(error) or 'no answer'}"
                )
        await self._trial.abandon()

    async def _after(self, new: ExpertEntry, flipped: Flipped) -> SwapReport:
        assert self._trial.launched is not None
        try:
            await asyncio.to_thread(self._parts.launcher.keep, self._trial.launched)
        except LaunchFailed as error:
            self._parts.tell(Step.FLIP, f"it serves, but will not be started again when it ends: {error}")
        if self._keep:
            return self._report(Outcome.ADDED, new, flipped)
        try:
            outcome = await self._drain(new, flipped.retired)
            leaving = [new] if outcome is Outcome.ROLLED_BACK else flipped.retired
            stopped = [entry.instance_id for entry in leaving if await stop_entry(self._parts, entry)]
        except asyncio.CancelledError:
            names = ", ".join(_names(flipped.retired)) or "nobody"
            self._parts.tell(Step.DRAIN, f"interrupted: {new.instance_id} serves, {names} still drains")
            raise
        return self._report(outcome, new, flipped, stopped)

    def _report(
        self, outcome: Outcome, new: ExpertEntry, flipped: Flipped, stopped: Sequence[str] = ()
    ) -> SwapReport:
        return SwapReport(
            outcome=outcome,
            slot=self._slot,
            instance_id=new.instance_id,
            epoch=flipped.epoch,
            retired=tuple(_names(flipped.retired)),
            stopped=tuple(stopped),
            comparison=self._trial.comparison,
        )

    async def _drain(self, new: ExpertEntry, retired: Sequence[ExpertEntry]) -> Outcome:
        """Returns once those that leave may be stopped. Raises SwapFailed when the new expert dies."""
        timing = self._parts.timing
        give_up = self._parts.clock() + timing.drain_seconds
        names = _names(retired)
        self._parts.tell(Step.DRAIN, f"sessions leave {', '.join(names) or 'nobody'}")
        while True:
            await self._check_new(new)
            late_seconds = self._parts.clock() - give_up
            why = f"nobody else serves slot {self._slot}"
            entries: list[ExpertEntry] = []
            try:
                entries = of_slot((await self._parts.registry.list()).experts, self._slot)
            except Unavailable as error:
                why = error.message
            serving = set(_names(ready(entries, self._slot)))
            if serving & set(names) and new.instance_id not in serving:
                self._parts.tell(Step.DRAIN, f"rolled back by somebody else: {new.instance_id} leaves")
                await wait_until_idle(self._parts, [new], give_up)
                return Outcome.ROLLED_BACK
            if serving - set(names) and (late_seconds > 0 or await are_idle(self._parts, retired)):
                return Outcome.SWAPPED
            if late_seconds > timing.flip_seconds:
                raise SwapFailed(Step.DRAIN, f"{', '.join(names)} drains, but was not stopped: {why}")
            await asyncio.sleep(timing.poll_seconds)

    async def _check_new(self, new: ExpertEntry) -> None:
        """Rolls back and raises SwapFailed when the new expert has ended while the old one still lives."""
        try:
            await self._trial.check_alive(Step.DRAIN)
        except SwapFailed as died:
            now = "look who serves the slot"
            try:
                revision = (await self._parts.registry.list()).revision
                answer = await self._parts.registry.roll_back(self._slot, revision, self._policy)
                now = f"{', '.join(answer.instance_ids)} serves again"
            except FusionRouteError as error:
                now = f"{error.message}"
            await self._trial.abandon()
            message = f"{new.instance_id} has ended while the old one drained; {now}: {died}"
            raise SwapFailed(Step.DRAIN, message, died.log_tail) from died


def _names(entries: Sequence[ExpertEntry]) -> list[str]:
    return sorted(entry.instance_id for entry in entries)
