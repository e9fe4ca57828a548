"""From what is stored of a turn back to what its streams show."""

from __future__ import annotations

from fusionroute.errors import Reason, SessionStateError
from router_service.generation import Ending, WrittenToken
from router_service.live_turn import LiveTurn
from router_service.records import to_token_records
from router_service.serving import CONTEXT_TOKENS, Serving
from router_service.stored_session import StoredSession, StoredTurn
from router_service.text import AnswerText
from router_service.turn_request import Turn, Wishes


def latest_turn(stored: StoredSession) -> StoredTurn:
    """The latest turn of a session. Raises SESSION_UNKNOWN when none was begun yet."""
    if stored.turn is None:
        raise SessionStateError(Reason.SESSION_UNKNOWN, f"session {stored.session_id!r} has no turn yet")
    return stored.turn


def read_back(serving: Serving, stored: StoredSession) -> LiveTurn:
    """A stored turn with the same text pieces as when it was written.

    Any checkpoint of the session's vocabulary gives the same text, so it needs not be the turn's own.

    Args:
        stored: the session from position 0 on.
    """
    turn = latest_turn(stored)
    parameters = Turn.from_stored(turn.parameters)
    live = LiveTurn(
        stored.session_id,
        turn.request_id,
        parameters,
        Wishes(drafting=serving.offer.default_drafting),
        turn.answer_position,
        context=context_of(stored),
    )
    answer_text = serving.answer_text(parameters.stops, live.context)
    for index, record in enumerate(to_token_records(stored.records[turn.answer_position :])):
        live.tokens.append(WrittenToken(index, record, answer_text.push(record.token_id)))
    if turn.finish_reason is not None:
        live.ending = Ending(turn.finish_reason, answer_text.finish(), turn.stop)
    return live


def answer_text_of(serving: Serving, live: LiveTurn) -> AnswerText:
    """The text of a turn as far as its tokens are published: what the next one adds is what `push` gives."""
    answer_text = serving.answer_text(live.turn.stops, live.context)
    for token in live.tokens:
        answer_text.push(token.record.token_id)
    return answer_text


def context_of(stored: StoredSession) -> list[int]:
    """The few tokens before the latest answer that decide how its first one is spelt."""
    position = latest_turn(stored).answer_position
    ids: list[int] = stored.records[max(0, position - CONTEXT_TOKENS) : position]["token_id"].tolist()
    return ids
