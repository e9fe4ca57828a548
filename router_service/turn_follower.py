"""Following a turn that another router writes: its stored tokens become those of the streams here."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fusionroute.errors import Reason, SessionStateError, Unavailable
from router_service.generation import Ending, WrittenToken
from router_service.live_turn import LiveTurn
from router_service.records import to_token_records
from router_service.session_store import SessionStore, was_deleted
from router_service.stored_session import SessionState, StoredSession
from router_service.text import AnswerText
from router_service.turn_reader import latest_turn

POLL_SECONDS = 0.05
ALONE_SECONDS = 1.0
"""A follower without a listener has no work to keep: it stops as soon as a stream cannot just be changing hands."""
GRACE_SECONDS = 1.0
"""For so long after an outage of Redis a lease that has run out meanwhile is left to its writer."""


@dataclass(slots=True, eq=False)
class TurnFollower:
    """What one router knows of a turn's stored tokens.

    Attributes:
        answer_text: has been fed the tokens of `live`.
        store_patience_seconds: how long the store may be silent.
        is_draining: whether this router is about to stop.
        num_checked: tokens of the answer that are known to be stored as they were published here.
    """

    store: SessionStore
    live: LiveTurn
    answer_text: AnswerText
    store_patience_seconds: float
    is_draining: Callable[[], bool]
    num_checked: int = 0
    _heard: float = field(default_factory=time.monotonic)
    _known: float = field(default_factory=time.monotonic)
    _grace_until: float = 0.0

    async def follow(self) -> Ending | None:
        """Publishes what is stored as it comes. None: the turn is unfinished and nobody writes it.

        Raises:
            FusionRouteError: SESSION_UNKNOWN, the session was deleted or lost; LEASE_LOST, another turn has followed;
                TURN_FORKED; STORE_UNAVAILABLE; LEFT_ALONE; DRAINING.
        """
        while True:
            stored = await self._look()
            if stored is not None:
                ending = self.adopt(stored)
                if ending is not None:
                    return ending
                if not stored.is_being_written and time.monotonic() >= self._grace_until:
                    return None
            if self.live.alone_for_seconds() > ALONE_SECONDS:
                raise Unavailable(Reason.LEFT_ALONE, "nobody follows the turn; resume the session")
            if self.is_draining():
                raise draining()
            await asyncio.sleep(POLL_SECONDS * random.uniform(0.8, 1.2))  # noqa: S311 - jitter

    def adopt(self, stored: StoredSession) -> Ending | None:
        """Checks stored tokens against the published ones and publishes the further ones.

        Args:
            stored: from any position up to the first unchecked token.

        Returns:
            How the turn ended, if it has.

        Raises:
            SessionStateError: TURN_FORKED, other tokens are stored than were published; LEASE_LOST.
        """
        turn, live = latest_turn(stored), self.live
        if turn.request_id != live.request_id:
            message = f"the turn of session {live.session_id!r} was left unfinished and another one begun"
            raise SessionStateError(Reason.LEASE_LOST, message, metadata={"succeeded": "true"})
        skipped = max(0, live.answer_position + self.num_checked - stored.from_position)
        for record in to_token_records(stored.records[skipped:]):
            if self.num_checked == len(live.tokens):
                piece = self.answer_text.push(record.token_id)
                live.publish(WrittenToken(self.num_checked, record, piece))
            elif live.tokens[self.num_checked].record.token_id != record.token_id:
                raise self._forked(f"token {self.num_checked} is stored as {record.token_id}")
            self.num_checked += 1
        if stored.state is not SessionState.FINISHED or turn.finish_reason is None:
            return None
        if self.num_checked < len(live.tokens):
            raise self._forked(f"it ends after {self.num_checked} of the tokens that were published here")
        return Ending(turn.finish_reason, self.answer_text.finish(), turn.stop)

    async def _look(self) -> StoredSession | None:
        """The session from the first unchecked token on; None while the store cannot say."""
        try:
            stored = await self.store.get(self.live.session_id, self.live.answer_position + self.num_checked)
        except Unavailable:
            if time.monotonic() - self._heard > self.store_patience_seconds:
                raise
            self._known = time.monotonic()  # a session that is not there afterwards may be on its way back
            self._grace_until = self._known + GRACE_SECONDS
            return None
        except SessionStateError as error:
            self._heard = time.monotonic()
            # Its writer, if it lives, puts a lost session back no later than it would renew its lease.
            if was_deleted(error) or self._heard - self._known > self.store.lease_seconds:
                raise
            self._grace_until = self._heard + GRACE_SECONDS
            return None
        self._heard = self._known = time.monotonic()
        return stored

    def _forked(self, what: str) -> SessionStateError:
        message = f"the turn of session {self.live.session_id!r} was written twice and differently: {what}"
        return SessionStateError(Reason.TURN_FORKED, message)


def draining() -> Unavailable:
    """What streams are told when their router stops."""
    return Unavailable(Reason.DRAINING, "the router stops; resume the session", retry_after_seconds=1.0)
