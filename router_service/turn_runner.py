"""One turn in this process, to its end: written here, or followed while another router writes it, by turns.

begun here ──> write <──takes over── follow <── resumed here, written elsewhere
                 └────overtaken────────^
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from uuid import uuid4

import structlog

from fusionroute.errors import FusionRouteError, InternalFault, Reason, SessionStateError, Unavailable
from router_service import metrics
from router_service.generation import Ending, TurnWriter
from router_service.live_turn import LiveTurn
from router_service.records import TokenRecord, pack, unpack
from router_service.serving import ServedCheckpoints, Serving
from router_service.session_closing import SessionCloser
from router_service.session_store import SessionStore
from router_service.session_text import Text
from router_service.stored_session import Lease, OpenTurn, SessionState, StoredSession
from router_service.token_log import TokenLog
from router_service.turn_admission import Reservation, TurnAdmission
from router_service.turn_follower import TurnFollower, draining
from router_service.turn_reader import answer_text_of, latest_turn
from router_service.turn_request import Turn
from router_service.turn_story import TurnStory

log = structlog.get_logger(__name__)

OVERTAKEN = frozenset({Reason.LEASE_LOST, Reason.STALE_FENCE})
MOST_FRUITLESS_TURNS = 5
"""So often in a row a writer may be overtaken without a token in between: two writers must not fight for ever."""


@dataclass(frozen=True, slots=True)
class TurnLimits:
    """What a turn may wait for.

    Attributes:
        alone_seconds: a turn that nobody has followed for so long is put aside; `Resume` continues it.
        store_patience_seconds: how long Redis may be away.
        one_off_ttl_seconds: for so long a session is kept in which no further turn follows.
    """

    alone_seconds: float = 30.0
    store_patience_seconds: float = 60.0
    one_off_ttl_seconds: float = 600.0

    def ttl_seconds(self, turn: Turn) -> float | None:
        """How long a turn's session is kept; None = as sessions are."""
        return self.one_off_ttl_seconds if turn.one_off else None


@dataclass(slots=True, eq=False)
class Draft:
    """The right to write a turn, and all that its writer begins with.

    Attributes:
        stored: all records of the session as the store holds them, packed.
        unstored: tokens of the answer that were published here and are not stored.
    """

    serving: Serving
    lease: Lease
    reservation: Reservation
    turn: OpenTurn
    text: Text
    stored: bytes
    unstored: list[TokenRecord]

    def hold(self) -> None:
        """From now on it is `release` that gives checkpoint and room back."""
        self.serving.enter()
        self.reservation.hand_over()

    def release(self) -> None:
        """Gives checkpoint and room back; the lease is the token log's."""
        self.serving.leave()
        self.reservation.release()


@dataclass(slots=True, eq=False)
class TurnRunner:
    """Runs one turn.

    Attributes:
        closer: gives back what the models hold of a turn that nobody will go on with.
        draft: held while the turn is written here.
        is_draining: whether this router is about to stop.
    """

    live: LiveTurn
    store: SessionStore
    served: ServedCheckpoints
    admission: TurnAdmission
    closer: SessionCloser
    limits: TurnLimits
    is_draining: Callable[[], bool]
    draft: Draft | None = None
    _follower: TurnFollower | None = None
    _num_fruitless: int = 0
    _has_written: bool = False

    async def run(self) -> None:
        """Until the turn has ended, broken off, or is put aside; the live turn tells which. Never raises but for being
        cancelled, which puts the turn aside."""
        live, story = self.live, TurnStory(self.live)
        try:
            ending = await self._until_ended()
        except asyncio.CancelledError:
            story.broke_off(Reason.DRAINING, "the router stops", was_written_here=self._has_written)
            live.fail(draining())
            raise
        except FusionRouteError as error:
            story.broke_off(error.reason, error.message, was_written_here=self._has_written)
            live.fail(error)
        except Exception as error:
            log.exception("turn_failed")
            story.broke_off(Reason.INTERNAL, repr(error), was_written_here=self._has_written)
            live.fail(InternalFault(Reason.INTERNAL, f"writing the turn failed: {type(error).__name__}"))
        else:
            story.ended(ending, was_written_here=self._has_written)
            live.end(ending)

    def close(self) -> None:
        """When its task has ended, perhaps before it has run at all."""
        self._release_draft()
        if not self.live.is_over:
            self.live.fail(draining())

    async def give_up(self) -> None:
        """Instead of running: gives back what was taken over."""
        if self.draft is not None:
            await self.store.release(self.draft.lease)
        self.close()

    async def take_over(self) -> None:
        """Makes this router the turn's writer, unless the turn has ended or somebody else writes it.

        Raises:
            FusionRouteError: DRAINING; CHECKPOINT_CHANGED, this router does not serve the turn's checkpoint; OutOfRoom;
                TURN_FORKED; STORE_UNAVAILABLE; SESSION_UNKNOWN.
        """
        live = self.live
        if self.is_draining():
            raise draining()
        serving = self._serving_of_turn()
        longest = min(live.answer_position + live.turn.max_tokens, serving.offer.max_context_tokens)
        with serving.in_use(), self.admission.reserve(longest) as reservation:
            try:
                lease = await self.store.acquire(
                    live.session_id,
                    owner=uuid4().hex,
                    create=False,
                    ttl_seconds=self.limits.ttl_seconds(live.turn),
                )
            except SessionStateError as error:
                if error.reason is not Reason.SESSION_BUSY:
                    raise
                return
            async with released_on_error(self.store, lease):
                stored = await self.store.get(live.session_id)
                if stored.state is SessionState.RUNNING:
                    (await self._following()).adopt(stored)
                    self.hold(self._draft_of(serving, lease, reservation, stored))
                    return
            await self.store.release(lease)

    async def _until_ended(self) -> Ending:
        while True:
            if self.draft is None:
                ending = await (await self._following()).follow()
                if ending is not None:
                    return ending
                await self._try_to_take_over()
                continue
            num_before = len(self.live.tokens)
            try:
                return await self._write(self.draft)
            except SessionStateError as error:
                if error.reason not in OVERTAKEN:
                    raise
                self._was_overtaken(error, len(self.live.tokens) > num_before)
            finally:
                self._release_draft()

    async def _try_to_take_over(self) -> None:
        try:
            await self.take_over()
        except Unavailable as error:
            metrics.TAKEOVERS.labels(outcome="failed").inc()
            if error.reason is not Reason.STORE_UNAVAILABLE:  # following has the patience for that
                raise
        except FusionRouteError:
            metrics.TAKEOVERS.labels(outcome="failed").inc()
            raise
        else:
            taken = self.draft is not None
            metrics.TAKEOVERS.labels(outcome="taken" if taken else "forestalled").inc()
            if taken:
                log.info("turn_taken_over", num_tokens=len(self.live.tokens))

    def _was_overtaken(self, error: SessionStateError, has_written: bool) -> None:
        self._num_fruitless = 0 if has_written else self._num_fruitless + 1
        if self._num_fruitless >= MOST_FRUITLESS_TURNS:
            raise error
        log.warning("turn_overtaken", message=error.message)

    async def _following(self) -> TurnFollower:
        """What was published is checked against the store from the beginning, once after each time of writing."""
        if self._follower is None:
            serving = self.served.of(self.live.turn.checkpoint) or self.served.current
            self._follower = TurnFollower(
                self.store,
                self.live,
                await asyncio.to_thread(answer_text_of, serving, self.live),
                self.limits.store_patience_seconds,
                self.is_draining,
            )
        return self._follower

    def _serving_of_turn(self) -> Serving:
        wanted = self.live.turn.checkpoint
        serving = self.served.of(wanted)
        if serving is None:
            raise SessionStateError(
                Reason.CHECKPOINT_CHANGED,
                f"the turn of session {self.live.session_id!r} was begun under checkpoint {wanted}, this router serves"
                f" {self.served.current.offer.checkpoint}",
            )
        rule = self.live.turn.rule
        if rule not in serving.offer.rules:  # the base model was taken out of the settings since it began
            raise SessionStateError(
                Reason.RULE_NOT_AVAILABLE,
                f"the turn of session {self.live.session_id!r} was begun under the rule {rule.value!r}, which this"
                " router cannot serve",
            )
        return serving

    def _draft_of(
        self, serving: Serving, lease: Lease, reservation: Reservation, stored: StoredSession
    ) -> Draft:
        turn, live = latest_turn(stored), self.live
        if turn.cancel_requested:
            live.cancelled = True
        held = stored.records.tobytes()
        unstored = [token.record for token in live.tokens[stored.length - turn.answer_position :]]
        records = unpack(held + pack(unstored))
        return Draft(
            serving=serving,
            lease=lease,
            reservation=reservation,
            turn=OpenTurn(turn.request_id, turn.answer_position, turn.parameters),
            text=Text.resumed(live.session_id, lease.fence, records, turn.answer_position, live.turn.slots),
            stored=held,
            unstored=unstored,
        )

    def hold(self, draft: Draft) -> None:
        """Makes this router the writer, before or between runs."""
        draft.hold()
        self._has_written = True
        self.draft = draft
        self.live.is_written_here = True
        self._follower = None

    def _release_draft(self) -> None:
        if self.draft is not None:
            draft, self.draft = self.draft, None
            self.live.is_written_here = False
            if self.live.turn.one_off:
                self.closer.give_back(draft.serving, draft.text)
            draft.release()

    async def _write(self, draft: Draft) -> Ending:
        live, text = self.live, draft.text
        structlog.contextvars.bind_contextvars(fence=draft.lease.fence)
        answer_text = draft.serving.answer_text(live.turn.stops, live.context)
        if live.tokens:
            answer_text = await asyncio.to_thread(answer_text_of, draft.serving, live)
        async with TokenLog(
            self.store,
            draft.lease,
            draft.stored,
            draft.turn,
            patience_seconds=self.limits.store_patience_seconds,
            on_cancel=live.cancel,
        ) as token_log:
            for record in draft.unstored:
                await token_log.room()
                token_log.append(record)
            constrained = None
            if live.turn.constraint is not None:
                answer_ids = text.tokens[live.answer_position :]
                constrained = await draft.serving.constraints.begin(live.turn.constraint, answer_ids)
            writer = TurnWriter(
                ensemble=draft.serving.ensemble,
                turn=live.turn,
                wishes=live.wishes,
                text=text,
                answer_position=live.answer_position,
                answer_text=answer_text,
                log=token_log,
                is_cancelled=lambda: live.cancelled,
                constrained=constrained,
            )
            await self._publish(writer, draft.reservation)
            ending = writer.ending
            assert ending is not None
            await token_log.finish(ending.reason, stop=ending.stop)
        live.costs = replace(
            writer.costs,
            num_replays=text.num_replays,
            store_seconds=token_log.waited_seconds,
            total_seconds=time.monotonic() - writer.costs.started,
        )
        return ending

    async def _publish(self, writer: TurnWriter, reservation: Reservation) -> None:
        live, task = self.live, asyncio.current_task()
        assert task is not None
        live.costs = writer.costs
        live.interrupt = lambda: _cancel_if(writer.is_asking, task)
        try:
            async with contextlib.aclosing(writer.write()) as tokens:
                async for token in tokens:
                    live.publish(token)
                    reservation.token_written()
                    if live.alone_for_seconds() > self.limits.alone_seconds:
                        raise Unavailable(Reason.LEFT_ALONE, "nobody follows the turn; resume the session")
        finally:
            live.nobody_writes()


@contextlib.asynccontextmanager
async def released_on_error(store: SessionStore, lease: Lease) -> AsyncIterator[None]:
    """Gives the lease back if the block raises."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(FusionRouteError):
            await store.release(lease)
        raise


def _cancel_if(is_asking: bool, task: asyncio.Task[None]) -> None:
    if is_asking:
        task.cancel()
