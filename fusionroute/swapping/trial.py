"""A new expert on its way to standing by: started, compared, registered, warmed up, compared with the old one by ear.

Nothing here changes who serves. Whatever fails, `abandon` stops what was started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NoReturn

from fusionroute.errors import FusionRouteError, Unavailable
from fusionroute.launching import Launch, Launched, LaunchFailed
from fusionroute.swapping.canary import Canary, Comparison, compare
from fusionroute.swapping.parts import Expert, Parts, Step, SwapFailed, SwapRefused, of_slot
from fusionroute.v1.common_pb2 import ModelIdentity
from fusionroute.v1.registry_pb2 import EXPERT_STATE_STANDBY, ExpertEntry

WARM_UP_STEPS = 8


class Trial:
    """One new expert.

    Args:
        parts: what it is made with.
        launch: what to start.
        canary: how to compare it; None = not.
        equal_weights: whether it must have the weights of those that serve, as a further instance of them.
    """

    def __init__(
        self, parts: Parts, launch: Launch, canary: Canary | None, *, equal_weights: bool = False
    ) -> None:
        self._parts, self._launch, self._canary = parts, launch, canary
        self._equal_weights = equal_weights
        self.launched: Launched | None = None
        self.comparison: Comparison | None = None

    async def run(self, rival: ExpertEntry | None) -> ExpertEntry:
        """The new expert's entry once it stands by and has passed.

        Args:
            rival: one that serves the slot; None = nobody does.

        Raises:
            SwapFailed: naming the step; SwapRefused, the model does not fit.
        """
        await self._start()
        address = await self._until_known()
        reached = await asyncio.to_thread(self._parts.launcher.reach, address)
        async with self._parts.open_expert(reached) as expert:
            model = await self._until_serving(expert)
            self._check_fits(model, rival)
            entry = await self._until_registered(address)
            await self._warm_up(expert, model)
            if rival is not None and self._canary is not None:
                await self._compare(self._canary, expert, rival)
        return entry

    async def abandon(self) -> None:
        """Stops what was started, if anything was."""
        if self.launched is None:
            return
        self._parts.tell(Step.STOP, f"{self.launched.name} is stopped")
        try:
            await asyncio.to_thread(self._parts.launcher.stop, self.launched, self._parts.timing.stop_seconds)
        except LaunchFailed as error:
            self._parts.tell(Step.STOP, f"{self.launched.name} could not be stopped: {error}")

    async def check_alive(self, step: Step) -> None:
        """Raises SwapFailed, with its last words, if the new expert has ended."""
        assert self.launched is not None
        try:
            await asyncio.to_thread(self._parts.launcher.check, self.launched)
        except LaunchFailed as error:
            raise SwapFailed(step, str(error), error.log_tail) from error

    async def _start(self) -> None:
        self._parts.tell(
            Step.START, f"{self._launch.model} for slot {self._launch.slot}, beside what serves it"
        )
        starting = asyncio.create_task(asyncio.to_thread(self._parts.launcher.start, self._launch))
        try:
            self.launched = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread cannot be called back; what it starts must be known, to be stopped.
            await asyncio.wait([starting])
            if not starting.cancelled() and starting.exception() is None:
                self.launched = starting.result()
            raise
        except LaunchFailed as error:
            raise SwapFailed(Step.START, str(error), error.log_tail) from error

    async def _until_known(self) -> str:
        """The address of the new expert."""
        assert self.launched is not None
        launched, timing = self.launched, self._parts.timing
        give_up = self._parts.clock() + timing.start_seconds
        while True:
            await self.check_alive(Step.SERVE)
            try:
                address = await asyncio.to_thread(self._parts.launcher.address_of, launched)
            except LaunchFailed as error:
                raise SwapFailed(Step.SERVE, str(error), error.log_tail) from error
            if address:
                return address
            if self._parts.clock() > give_up:
                await self._give_up(Step.SERVE, f"{launched.name} does not serve", timing.start_seconds)
            await asyncio.sleep(timing.poll_seconds)

    async def _until_serving(self, expert: Expert) -> ModelIdentity:
        assert self.launched is not None
        give_up = self._parts.clock() + self._parts.timing.start_seconds
        while True:
            try:
                info = await expert.info()
            except Unavailable as error:
                await self.check_alive(Step.SERVE)
                if self._parts.clock() > give_up:
                    what = f"{self.launched.name} does not answer: {error.message}"
                    await self._give_up(Step.SERVE, what, self._parts.timing.start_seconds)
                await asyncio.sleep(self._parts.timing.poll_seconds)
            else:
                self._parts.tell(Step.SERVE, f"{self.launched.name} serves {info.model.name}")
                return info.model

    def _check_fits(self, model: ModelIdentity, rival: ExpertEntry | None) -> None:
        if rival is None:
            self._parts.tell(Step.COMPARE, "nobody serves the slot; the router judges alone")
            return
        check_fits(model, rival.model)
        is_equal = model.weights_fingerprint == rival.model.weights_fingerprint
        if self._equal_weights and not is_equal:
            raise SwapRefused(
                Step.COMPARE,
                f"{self._launch.model} has weights {model.weights_fingerprint}, those that serve slot "
                f"{self._launch.slot} have {rival.model.weights_fingerprint}: use swap to change weights",
            )
        self._parts.tell(Step.COMPARE, f"it fits; its weights are {'the same' if is_equal else 'new'}")

    async def _until_registered(self, address: str) -> ExpertEntry:
        timing = self._parts.timing
        give_up = self._parts.clock() + timing.register_seconds
        why = "it is not in the registry"
        while True:
            try:
                entries = of_slot((await self._parts.registry.list()).experts, self._launch.slot)
            except Unavailable as error:
                entries, why = [], error.message
            for entry in entries:
                if entry.address == address and entry.state == EXPERT_STATE_STANDBY:
                    self._parts.tell(Step.REGISTER, f"{entry.instance_id} stands by")
                    return entry
            await self.check_alive(Step.REGISTER)
            if self._parts.clock() > give_up:
                await self._give_up(Step.REGISTER, why, timing.register_seconds)
            await asyncio.sleep(timing.poll_seconds)

    async def _warm_up(self, expert: Expert, model: ModelIdentity) -> None:
        steps = min(WARM_UP_STEPS, model.max_context_tokens)
        try:
            await expert.warm_up([token_id % model.logits_width for token_id in range(steps)])
        except FusionRouteError as error:
            raise SwapFailed(Step.WARM_UP, f"{error.message} ({error.reason.value})") from error
        self._parts.tell(Step.WARM_UP, f"{steps} steps with finite logits")

    async def _compare(self, canary: Canary, new: Expert, rival: ExpertEntry) -> None:
        reached = await asyncio.to_thread(self._parts.launcher.reach, rival.address)
        try:
            async with self._parts.open_expert(reached) as old:
                found = await compare(canary, old, new, rival.model.logits_width)
        except FusionRouteError as error:
            what = f"the canary could not be scored: {error.message} ({error.reason.value})"
            raise SwapFailed(Step.CANARY, what) from error
        self.comparison = found
        if found.is_worse:
            raise SwapRefused(Step.CANARY, f"the new expert is worse than the old one: {found}")
        self._parts.tell(Step.CANARY, str(found))

    async def _give_up(self, step: Step, what: str, seconds: float) -> NoReturn:
        assert self.launched is not None
        try:
            last = await asyncio.to_thread(self._parts.launcher.log_tail, self.launched)
        except LaunchFailed:
            last = []
        raise SwapFailed(step, f"gave up after {seconds:g} s: {what}", last)


def check_fits(new: ModelIdentity, old: ModelIdentity) -> None:
    """Returns if `new` can go on with the sessions of `old`. Raises SwapRefused, naming what differs."""
    for field in ("tokenizer_fingerprint", "logits_width"):
        would_be, was = getattr(new, field), getattr(old, field)
        if would_be != was:
            raise SwapRefused(Step.COMPARE, f"the new model has {field} {would_be}, the slot needs {was}")
    if new.max_context_tokens < old.max_context_tokens:
        raise SwapRefused(
            Step.COMPARE,
            f"the new model has a context of {new.max_context_tokens} tokens, sessions of the slot may have "
            f"{old.max_context_tokens}",
        )


def rival_of(entries: Sequence[ExpertEntry], serving: Sequence[ExpertEntry]) -> ExpertEntry | None:
    """With whom a new expert is compared: one that serves, else one that has served."""
    others = [entry for entry in entries if entry.state != EXPERT_STATE_STANDBY]
    return next(iter([*serving, *others]), None)
