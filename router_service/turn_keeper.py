"""Begins, continues and ends turns: the store says what was written, this process writes what is missing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from uuid import uuid4
from weakref import WeakValueDictionary

import structlog

from fusionroute.background import end_task
from fusionroute.errors import (
    FusionRouteError,
    InternalFault,
    InvalidRequest,
    Reason,
    SessionStateError,
    Unavailable,
    invalid,
)
from fusionroute.v1 import router_pb2
from router_service.asking import Text
from router_service.generation import Ending, TurnWriter, WrittenToken
from router_service.live_turn import LiveTurn
from router_service.records import pack_prompt, to_token_records
from router_service.serving import CONTEXT_TOKENS, ServedCheckpoints, Serving
from router_service.session_store import SessionStore, new_session_id
from router_service.stored_session import (
    FinishReason,
    Lease,
    SessionState,
    StoredSession,
    StoredTurn,
)
from router_service.text import AnswerText
from router_service.token_log import TokenLog
from router_service.turn_admission import Reservation, TurnAdmission
from router_service.turn_request import Offer, Showing, Turn, read_prompt, read_showing, read_turn

log = structlog.get_logger(__name__)

CLEAN_UP_SECONDS = 5.0
"""What a turn that is put aside has to store its tokens and give its lease back."""


@dataclass(frozen=True, slots=True)
class TurnLimits:
    """How long turns run here without anybody listening.

    Attributes:
        alone_seconds: a turn that nobody has followed for so long is put aside; `Resume` continues it.
    """

    alone_seconds: float = 30.0


@dataclass(slots=True, eq=False)
class TurnKeeper:
    """The turns of one router process.

    A turn is written by the checkpoint that was current when it began, even when another one is promoted meanwhile.
    """

    served: ServedCheckpoints
    store: SessionStore
    admission: TurnAdmission
    limits: TurnLimits = field(default_factory=TurnLimits)
    _live: dict[str, LiveTurn] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _draining: bool = False
    _restoring: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    @property
    def num_running(self) -> int:
        """Turns that are being written here."""
        return len(self._tasks)

    @property
    def num_tokens_written(self) -> int:
        """Tokens of the running turns; moves while turns make progress."""
        return sum(len(live.tokens) for live in self._live.values())

    async def generate(self, request: router_pb2.GenerateRequest) -> LiveTurn:
        """Begins a turn, or finds the one that the same request id has begun.

        Raises:
            FusionRouteError: the request cannot be served; nothing was written.
        """
        with self.served.current.in_use() as serving:
            return await self._generate(request, serving)

    async def _generate(self, request: router_pb2.GenerateRequest, serving: Serving) -> LiveTurn:
        turn, showing = read_turn(request, serving.offer), read_showing(request)
        self._refuse_if_draining()
        session_id = request.session_id or new_session_id()
        live = self._live.get(session_id)
        if live is not None:
            if request.request_id and live.request_id == request.request_id:
                return live
            raise _busy(session_id)
        self.admission.check()  # a refusal must cost nothing: no look into the store, nothing encoded
        stored = await self._find(session_id) if request.session_id else None
        if stored is not None and request.request_id and _request_id(stored) == request.request_id:
            return await self.resume(session_id)
        tokens = [] if stored is None else stored.records["token_id"].tolist()
        prompt = await read_prompt(request, serving.tokenizer, serving.offer, first_turn=not tokens)
        _check_context(serving.offer, len(tokens), len(prompt))
        with self._reserved(serving.offer, len(tokens) + len(prompt), turn) as reservation:
            lease = await self.store.acquire(session_id, owner=uuid4().hex)
            async with _released_on_error(self.store, lease):
                begun = await self.store.begin_turn(
                    lease, len(tokens), pack_prompt(prompt), turn.to_stored(), request_id=request.request_id
                )
            if begun.is_new:
                text = Text(session_id, lease.fence, tokens + prompt)
                live = LiveTurn(session_id, request.request_id, turn, showing, begun.answer_position)
                answer_text = serving.answer_text(turn.stops, text.tokens)
                self._start(serving, live, lease, text, answer_text, reservation)
                return live
        # another router has begun this very request since we looked
        await self.store.release(lease)
        return await self.resume(session_id)

    async def resume(self, session_id: str, from_token: int = 0) -> LiveTurn:
        """The latest turn of a session, running, complete or continued.

        Raises:
            FusionRouteError: SESSION_UNKNOWN; SESSION_BUSY when another router writes it; CHECKPOINT_CHANGED when it
                was begun under another checkpoint; INVALID_FIELD when the turn ends before `from_token`.
        """
        live = self._live.get(session_id) or await self._restored(session_id)
        if live.is_over and from_token > len(live.tokens):
            raise invalid("from_token", from_token, f"the turn has {len(live.tokens)} tokens")
        return live

    async def cancel(self, session_id: str) -> bool:
        """Ends the running turn of a session; returns whether one was running. Raises SESSION_UNKNOWN."""
        live = self._live.get(session_id)
        if live is not None:
            live.cancel()
            return True
        outcome = await self.store.cancel(session_id)
        if outcome.was_running and not outcome.writer_is_alive:
            lease = await self.store.acquire(session_id, owner=uuid4().hex, create=False)
            async with _released_on_error(self.store, lease):
                await self.store.finish(lease, lease.length, FinishReason.CANCELLED)
        return outcome.was_running

    async def delete(self, session_id: str) -> bool:
        """Forgets a session in the store; its running turn ends."""
        live = self._live.get(session_id)
        if live is not None:
            live.cancel()
        return await self.store.delete(session_id)

    async def answer_text(self, stored: StoredSession) -> str:
        """The text of a stored session's latest answer."""
        turn = _latest_turn(stored)
        live, answer_text = await asyncio.to_thread(_read_back, self.served.current, stored, turn)
        pieces = [token.text for token in live.tokens]
        pieces.append(answer_text.finish() if live.ending is None else live.ending.text)
        return "".join(pieces)

    async def drain(self, timeout_seconds: float) -> None:
        """Refuses new turns, gives the running ones some time and puts the others aside, to be resumed elsewhere."""
        self._draining = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_seconds)
        await asyncio.gather(
            *(end_task(task, patience_seconds=CLEAN_UP_SECONDS) for task in list(self._tasks))
        )

    # --- what is written already ---------------------------------------------------------------------------------

    async def _restored(self, session_id: str) -> LiveTurn:
        """Of several streams that want the same turn at once, one restores it and the others follow."""
        lock = self._restoring.setdefault(session_id, asyncio.Lock())
        async with lock:
            if (live := self._live.get(session_id)) is not None:
                return live
            try:
                return await self._restore(session_id)
            except SessionStateError as error:
                live = self._live.get(session_id)  # a turn may have been begun here meanwhile
                if live is None or error.reason is not Reason.SESSION_BUSY:
                    raise
                return live

    async def _restore(self, session_id: str) -> LiveTurn:
        stored = await self.store.get(session_id)
        turn = _latest_turn(stored)
        if stored.state is SessionState.FINISHED:
            return (await asyncio.to_thread(_read_back, self.served.current, stored, turn))[0]
        if stored.is_being_written:
            raise _busy(session_id, stored.lease_remaining_seconds)
        with self._serving_of(stored).in_use() as serving:
            return await self._continue(session_id, serving)

    async def _continue(self, session_id: str, serving: Serving) -> LiveTurn:
        self._refuse_if_draining()
        self.admission.check()
        lease = await self.store.acquire(session_id, owner=uuid4().hex, create=False)
        async with _released_on_error(self.store, lease):
            stored = await self.store.get(session_id)
            if stored.state is SessionState.FINISHED or self._serving_of(stored) is not serving:
                raise _busy(session_id)  # the turn was finished, or another one begun, since we looked
            live, answer_text = await asyncio.to_thread(_read_back, serving, stored, _latest_turn(stored))
            with self._reserved(serving.offer, live.answer_position, live.turn) as reservation:
                text = Text(session_id, lease.fence, stored.records["token_id"].tolist())
                self._start(serving, live, lease, text, answer_text, reservation)
        return live

    def _serving_of(self, stored: StoredSession) -> Serving:
        """The checkpoint under which the latest turn was begun. Raises CHECKPOINT_CHANGED."""
        wanted = _latest_turn(stored).parameters.checkpoint
        serving = self.served.of(wanted)
        if serving is None:
            raise SessionStateError(
                Reason.CHECKPOINT_CHANGED,
                f"the turn of session {stored.session_id!r} was begun under checkpoint {wanted}, this router serves"
                f" {self.served.current.offer.checkpoint}",
            )
        return serving

    # --- writing ---------------------------------------------------------------------------------------------------

    def _start(
        self,
        serving: Serving,
        live: LiveTurn,
        lease: Lease,
        text: Text,
        answer_text: AnswerText,
        reservation: Reservation,
    ) -> None:
        self._live[live.session_id] = live
        task = asyncio.create_task(
            self._write(serving, live, lease, text, answer_text, reservation), name=f"turn {live.session_id}"
        )
        reservation.hand_over()
        serving.enter()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: serving.leave())
        task.add_done_callback(lambda _: reservation.release())

    async def _write(
        self,
        serving: Serving,
        live: LiveTurn,
        lease: Lease,
        text: Text,
        answer_text: AnswerText,
        reservation: Reservation,
    ) -> None:
        started = time.monotonic()
        try:
            ending = await self._write_logged(serving, live, lease, text, answer_text, reservation)
        except asyncio.CancelledError:
            live.fail(
                Unavailable(Reason.DRAINING, "the router stops; resume the session", retry_after_seconds=1.0)
            )
            raise
        except FusionRouteError as error:
            log.warning(
                "turn_broke_off", session=live.session_id, reason=error.reason.value, message=error.message
            )
            live.fail(error)
        except Exception as error:
            log.exception("turn_failed", session=live.session_id)
            live.fail(InternalFault(Reason.INTERNAL, f"writing the turn failed: {type(error).__name__}"))
        else:
            log.info(
                "turn_finished",
                session=live.session_id,
                reason=ending.reason.value,
                num_tokens=len(live.tokens),
                seconds=round(time.monotonic() - started, 4),
            )
            live.end(ending)
        finally:
            if self._live.get(live.session_id) is live:
                del self._live[live.session_id]

    async def _write_logged(
        self,
        serving: Serving,
        live: LiveTurn,
        lease: Lease,
        text: Text,
        answer_text: AnswerText,
        reservation: Reservation,
    ) -> Ending:
        async with TokenLog(self.store, lease, len(text.tokens)) as token_log:
            writer = TurnWriter(
                ensemble=serving.ensemble,
                turn=live.turn,
                showing=live.showing,
                text=text,
                answer_position=live.answer_position,
                answer_text=answer_text,
                log=token_log,
                is_cancelled=lambda: live.cancelled,
            )
            live.costs = writer.costs
            task = asyncio.current_task()
            assert task is not None
            live.interrupt = lambda: _cancel_if(writer.is_asking, task)
            async with contextlib.aclosing(writer.write()) as tokens:
                async for token in tokens:
                    live.publish(token)
                    reservation.token_written()
                    if live.alone_for_seconds() > self.limits.alone_seconds:
                        raise Unavailable(Reason.LEFT_ALONE, "nobody follows the turn; resume the session")
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

    # --- checks ----------------------------------------------------------------------------------------------------

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


def _read_back(serving: Serving, stored: StoredSession, turn: StoredTurn) -> tuple[LiveTurn, AnswerText]:
    """A stored turn with the same text pieces as when it was written.

    Any checkpoint of the session's vocabulary gives the same text, so a finished turn needs not its own.
    """
    parameters = Turn.from_stored(turn.parameters)
    live = LiveTurn(stored.session_id, turn.request_id, parameters, Showing(), turn.answer_position)
    before = stored.records[max(0, turn.answer_position - CONTEXT_TOKENS) : turn.answer_position]
    answer_text = serving.answer_text(parameters.stops, before["token_id"].tolist())
    records = to_token_records(stored.records[turn.answer_position :])
    for index, record in enumerate(records):
        live.tokens.append(WrittenToken(index, record, answer_text.push(record.token_id)))
    if turn.finish_reason is not None:
        live.ending = Ending(turn.finish_reason, answer_text.finish(), turn.stop)
    return live, answer_text


def _check_context(offer: Offer, num_before: int, num_prompt: int) -> None:
    limit = offer.max_context_tokens - 1
    if num_before + num_prompt > limit:
        raise InvalidRequest(
            Reason.CONTEXT_FULL,
            f"{num_before} tokens of the session + {num_prompt} of the prompt = {num_before + num_prompt}; the"
            f" longest prompt is {limit} tokens",
            metadata={"field": "prompt", "limit": str(limit)},
        )


@contextlib.asynccontextmanager
async def _released_on_error(store: SessionStore, lease: Lease) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(FusionRouteError):
            await store.release(lease)
        raise


def _cancel_if(is_asking: bool, task: asyncio.Task[None]) -> None:
    if is_asking:
        task.cancel()


def _latest_turn(stored: StoredSession) -> StoredTurn:
    if stored.turn is None:
        raise SessionStateError(Reason.SESSION_UNKNOWN, f"session {stored.session_id!r} has no turn yet")
    return stored.turn


def _request_id(stored: StoredSession) -> str:
    return "" if stored.turn is None else stored.turn.request_id


def _busy(session_id: str, retry_after_seconds: float = 0.5) -> SessionStateError:
    return SessionStateError(
        Reason.SESSION_BUSY,
        f"a turn of session {session_id!r} is being written",
        retry_after_seconds=retry_after_seconds,
    )
