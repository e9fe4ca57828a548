"""Begins, finds and ends turns: the store says what was written, runners of this process write what is missing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import uuid4
from weakref import WeakValueDictionary

import structlog

from fusionroute.background import end_task
from fusionroute.errors import (
    InvalidRequest,
    Reason,
    SessionStateError,
    Unavailable,
    invalid,
)
from fusionroute.v1 import router_pb2
from router_service import metrics
from router_service.live_turn import LiveTurn
from router_service.records import pack_prompt
from router_service.serving import CONTEXT_TOKENS, ServedCheckpoints, Serving
from router_service.session_closing import SessionCloser
from router_service.session_store import SessionStore, new_session_id
from router_service.session_text import Text
from router_service.stored_session import FinishReason, OpenTurn, SessionState, StoredSession
from router_service.turn_admission import Reservation, TurnAdmission
from router_service.turn_reader import answer_text_of, latest_turn, read_back
from router_service.turn_request import Offer, Turn, Wishes, read_prompt, read_turn, read_wishes
from router_service.turn_runner import Draft, TurnLimits, TurnRunner, released_on_error

log = structlog.get_logger(__name__)

CLEAN_UP_SECONDS = 5.0
"""What a turn that is put aside has to store its tokens and give its lease back."""
BEGIN_SECONDS = 5.0
"""How long to look on while a session changes under a request that wants to begin a turn in it."""
BEGIN_PAUSE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class _Request:
    """A request that was checked: what is to be written, where, and under which checkpoint."""

    message: router_pb2.GenerateRequest
    serving: Serving
    turn: Turn
    wishes: Wishes
    session_id: str
    turn_id: str

    def has_begun(self, turn_id: str) -> bool:
        """Whether a turn of this id is the one that is asked for."""
        return bool(self.message.request_id) and turn_id == self.turn_id


@dataclass(slots=True, eq=False)
class TurnKeeper:
    """The turns of one router process.

    A turn is written by the checkpoint that was current when it began, even when another one is promoted meanwhile.
    """

    served: ServedCheckpoints
    store: SessionStore
    admission: TurnAdmission
    closer: SessionCloser
    limits: TurnLimits = field(default_factory=TurnLimits)
    _live: dict[str, LiveTurn] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _draining: bool = False
    _restoring: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    @property
    def num_running(self) -> int:
        """Turns that are being written here."""
        return sum(live.is_written_here for live in self._live.values())

    @property
    def is_draining(self) -> bool:
        """Whether new turns are refused because the router is about to stop."""
        return self._draining

    @property
    def num_tokens_written(self) -> int:
        """Tokens of the running turns; moves while turns make progress."""
        return sum(len(live.tokens) for live in self._live.values())

    async def generate(self, request: router_pb2.GenerateRequest) -> LiveTurn:
        """Begins a turn, or finds the one that the same request id has begun, here or on another router.

        Raises:
            FusionRouteError: the request cannot be served; nothing was written.
        """
        with self.served.current.in_use() as serving:
            turn, wishes = read_turn(request, serving.offer), read_wishes(request, serving.offer)
            if turn.constraint is not None:
                self.admission.check()  # compiling one costs something
                await serving.constraints.check(turn.constraint)
            session_id = request.session_id or new_session_id()
            turn_id = request.request_id or uuid4().hex
            return await self._generate(_Request(request, serving, turn, wishes, session_id, turn_id))

    async def resume(self, session_id: str, from_token: int = 0) -> LiveTurn:
        """The latest turn of a session: running here, complete, followed while another router writes it, or continued.

        Raises:
            FusionRouteError: SESSION_UNKNOWN; CHECKPOINT_CHANGED when nobody writes it and it was begun under another
                checkpoint; INVALID_FIELD when the turn ends before `from_token`; OutOfRoom; STORE_UNAVAILABLE.
        """
        live = self._live.get(session_id) or await self._restored(session_id)
        if live.is_over and from_token > len(live.tokens):
            raise invalid("from_token", from_token, f"the turn has {len(live.tokens)} tokens")
        return live

    async def cancel(self, session_id: str) -> bool:
        """Ends the running turn of a session, whoever writes it; returns whether one was running.

        Raises:
            FusionRouteError: SESSION_UNKNOWN; STORE_UNAVAILABLE.
        """
        live = self._live.get(session_id)
        if live is not None and live.is_written_here:
            live.cancel()
            return True
        outcome = await self.store.cancel(session_id)
        if outcome.was_running and not outcome.writer_is_alive:
            await self._finish_abandoned(session_id)
        return outcome.was_running

    async def delete(self, session_id: str) -> bool:
        """Forgets a session in the store; its running turn ends, whoever writes it."""
        live = self._live.get(session_id)
        if live is not None:
            live.cancel()
        return await self.store.delete(session_id)

    async def answer_text(self, stored: StoredSession) -> str:
        """The text of a stored session's latest answer."""
        serving = self.served.current
        live = await asyncio.to_thread(read_back, serving, stored)
        pieces = [token.text for token in live.tokens]
        if live.ending is not None:
            pieces.append(live.ending.text)
        else:
            pieces.append((await asyncio.to_thread(answer_text_of, serving, live)).finish())
        return "".join(pieces)

    async def drain(self, timeout_seconds: float) -> None:
        """Refuses new turns, gives the running ones some time and puts the others aside, to be resumed elsewhere.

        Streams of turns that another router writes end at once; it is for their clients to go there.
        """
        self._draining = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_seconds)
        await asyncio.gather(
            *(end_task(task, patience_seconds=CLEAN_UP_SECONDS) for task in list(self._tasks))
        )

    # --- beginning -----------------------------------------------------------------------------------------------

    async def _generate(self, request: _Request) -> LiveTurn:
        """Looks and begins, and looks again when the session has changed between the two."""
        give_up = time.monotonic() + BEGIN_SECONDS
        while True:
            self._refuse_if_draining()
            live = self._live.get(request.session_id)
            if live is not None:
                if request.has_begun(live.request_id):
                    return live
                raise _busy(request.session_id)
            self.admission.check()  # a refusal must cost nothing: no look into the store, nothing encoded
            stored = await self._find(request.session_id) if request.message.session_id else None
            if stored is not None and stored.turn is not None and request.has_begun(stored.turn.request_id):
                return await self.resume(request.session_id)
            _refuse_after_one_off(stored)
            try:
                begun = await self._begin(request, stored)
            except SessionStateError as error:
                if not _may_be_other_next_time(error, request, stored) or time.monotonic() > give_up:
                    raise
                await asyncio.sleep(BEGIN_PAUSE_SECONDS)
                continue
            # None: another router has begun this very request since we looked
            return begun or await self.resume(request.session_id)

    async def _begin(self, request: _Request, stored: StoredSession | None) -> LiveTurn | None:
        """Begins the turn behind what is stored. None: this very request has begun one already."""
        serving, turn = request.serving, request.turn
        before = b"" if stored is None else stored.records.tobytes()
        num_before = 0 if stored is None else stored.length
        prompt = await read_prompt(
            request.message, serving.tokenizer, serving.offer, first_turn=num_before == 0
        )
        _check_context(serving.offer, num_before, len(prompt))
        with self._reserved(serving.offer, num_before + len(prompt), turn) as reservation:
            lease = await self.store.acquire(
                request.session_id, owner=uuid4().hex, ttl_seconds=self.limits.ttl_seconds(turn)
            )
            open_turn = OpenTurn(request.turn_id, num_before + len(prompt), turn.to_stored())
            records = pack_prompt(prompt)
            async with released_on_error(self.store, lease):
                begun = await self.store.begin_turn(
                    lease, num_before, records, open_turn.parameters, request_id=request.turn_id
                )
            if begun.is_new:
                text = _text_before(request.session_id, lease.fence, stored)
                text.tokens.extend(prompt)
                live = LiveTurn(
                    request.session_id,
                    request.turn_id,
                    turn,
                    request.wishes,
                    begun.answer_position,
                    context=text.tokens[-CONTEXT_TOKENS:],
                )
                runner = self._runner(live)
                runner.hold(Draft(serving, lease, reservation, open_turn, text, before + records, []))
                self._start(runner)
                return live
        await self.store.release(lease)
        return None

    # --- what is written already ---------------------------------------------------------------------------------

    async def _restored(self, session_id: str) -> LiveTurn:
        """Of several streams that want the same turn at once, one restores it and the others follow."""
        lock = self._restoring.setdefault(session_id, asyncio.Lock())
        async with lock:
            return self._live.get(session_id) or await self._restore(session_id)

    async def _restore(self, session_id: str) -> LiveTurn:
        stored = await self.store.get(session_id)
        live = await asyncio.to_thread(read_back, self.served.current, stored)
        if stored.state is SessionState.FINISHED:
            return live
        self._refuse_if_draining()
        runner = self._runner(live)
        async with _closed_on_error(runner):
            if stored.is_being_written:
                metrics.FOLLOWED_TURNS.inc()
            else:
                await runner.take_over()
            if (other := self._live.get(session_id)) is not None:  # a turn was begun here meanwhile
                await runner.give_up()
                return other
        self._start(runner)
        return live

    async def _finish_abandoned(self, session_id: str) -> None:
        """Ends a turn that nobody writes as cancelled. Whoever takes it up meanwhile finds the wish in the store."""
        turn = Turn.from_stored(latest_turn(await self.store.get(session_id)).parameters)
        try:
            lease = await self.store.acquire(
                session_id, owner=uuid4().hex, create=False, ttl_seconds=self.limits.ttl_seconds(turn)
            )
        except SessionStateError as error:
            if error.reason is Reason.SESSION_BUSY:
                return
            raise
        async with released_on_error(self.store, lease):
            await self.store.finish(lease, lease.length, FinishReason.CANCELLED)

    # --- running -------------------------------------------------------------------------------------------------

    def _runner(self, live: LiveTurn) -> TurnRunner:
        return TurnRunner(
            live,
            self.store,
            self.served,
            self.admission,
            self.closer,
            self.limits,
            is_draining=lambda: self._draining,
        )

    def _start(self, runner: TurnRunner) -> None:
        live = runner.live
        self._live[live.session_id] = live
        task = asyncio.create_task(runner.run(), name=f"turn {live.session_id}")
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if self._live.get(live.session_id) is live:
                del self._live[live.session_id]
            runner.close()

        task.add_done_callback(ended)

    # --- checks --------------------------------------------------------------------------------------------------

    async def _find(self, session_id: str) -> StoredSession | None:
        try:
            return await self.store.get(session_id)
        except SessionStateError as error:
            if error.reason is Reason.SESSION_UNKNOWN:
                return None
            raise

    def _refuse_if_draining(self) -> None:
        if self._draining:
            raise Unavailable(Reason.DRAINING, "the router is about to stop", retry_after_seconds=1.0)

    def _reserved(self, offer: Offer, answer_position: int, turn: Turn) -> Reservation:
        return self.admission.reserve(min(answer_position + turn.max_tokens, offer.max_context_tokens))


def _may_be_other_next_time(
    error: SessionStateError, request: _Request, stored: StoredSession | None
) -> bool:
    """Whether beginning failed only because the session changed after it was looked at."""
    if error.reason is not Reason.SESSION_BUSY:
        return error.reason in (Reason.POSITION_AHEAD, Reason.SESSION_UNKNOWN, Reason.STALE_FENCE)
    # Somebody may be beginning this very turn; one that already runs for another request will not be done soon.
    return bool(request.message.request_id) and (stored is None or stored.state is not SessionState.RUNNING)


def _refuse_after_one_off(stored: StoredSession | None) -> None:
    if stored is not None and stored.turn is not None and Turn.from_stored(stored.turn.parameters).one_off:
        limit = "its turn was one_off, so that none may follow; begin another session"
        raise invalid("session_id", stored.session_id, limit)


def _text_before(session_id: str, fence: int, stored: StoredSession | None) -> Text:
    """The text of a session before a new turn's prompt."""
    if stored is None or stored.turn is None:
        return Text(session_id, fence, [] if stored is None else stored.records["token_id"].tolist())
    latest = latest_turn(stored)
    slots = Turn.from_stored(latest.parameters).slots
    return Text.resumed(session_id, fence, stored.records, latest.answer_position, slots)


def _check_context(offer: Offer, num_before: int, num_prompt: int) -> None:
    limit = offer.max_context_tokens - 1
    if num_before + num_prompt > limit:
        raise InvalidRequest(
            Reason.CONTEXT_FULL,
            f"{num_before} tokens of the session + {num_prompt} of the prompt = {num_before + num_prompt}; the"
            f" longest prompt is {limit} tokens",
            metadata={"field": "prompt", "limit": str(limit)},
        )


@asynccontextmanager
async def _closed_on_error(runner: TurnRunner) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        runner.close()
        raise


def _busy(session_id: str) -> SessionStateError:
    return SessionStateError(
        Reason.SESSION_BUSY, f"a turn of session {session_id!r} is being written", retry_after_seconds=0.5
    )
