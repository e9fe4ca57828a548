"""What is told of a turn from its beginning to its end: lines in the log, a count, a span."""

from __future__ import annotations

import time
from collections import Counter

import structlog

from fusionroute import tracing
from fusionroute.errors import Reason
from fusionroute.rpc_context import bind_request
from router_service import metrics
from router_service.generation import Ending
from router_service.live_turn import LiveTurn
from router_service.records import TokenSource

log = structlog.get_logger(__name__)


class TurnStory:
    """Of one run of a turn in this process; to be made in the task that runs it.

    From then on every line of that task carries the session and the request.
    """

    def __init__(self, live: LiveTurn) -> None:
        self._live = live
        self._started = time.monotonic()
        self._num_before = len(live.tokens)
        bind_request(live.request_id)
        structlog.contextvars.bind_contextvars(session=live.session_id)
        rule = live.turn.rule.value
        self._span = tracing.begin(
            "turn", {"session": live.session_id, "request": live.request_id, "rule": rule}
        )
        log.info(
            "turn_begun" if live.is_written_here else "turn_followed",
            rule=rule,
            num_prompt_tokens=live.answer_position,
            num_tokens=self._num_before,
            **({"trace": tracing.trace_id()} if self._span is not None else {}),
        )

    def ended(self, ending: Ending, *, was_written_here: bool) -> None:
        """The turn is complete."""
        self._count("finished", ending.reason.value, was_written_here)
        facts = self._facts()
        log.info("turn_finished", reason=ending.reason.value, **facts, tokens_by_slot=self._tokens_by_slot())
        self._end_span(facts, "")

    def broke_off(self, reason: Reason, message: str, *, was_written_here: bool) -> None:
        """The turn goes on elsewhere, later, or never."""
        self._count("broke_off", reason.value, was_written_here)
        facts = self._facts()
        log.warning("turn_broke_off", reason=reason.value, message=message, **facts)
        self._end_span(facts, reason.value)

    def _count(self, outcome: str, reason: str, was_written_here: bool) -> None:
        if was_written_here:
            metrics.TURNS.labels(outcome, reason, self._live.turn.rule.value).inc()

    def _facts(self) -> dict[str, int | float]:
        """What the log says; zeros are left out."""
        facts: dict[str, int | float] = {
            "num_tokens": len(self._live.tokens),
            "seconds": round(time.monotonic() - self._started, 4),
        }
        costs = self._live.costs
        if costs is not None:
            facts["first_token_seconds"] = round(costs.first_token_seconds, 4)
            rare = {
                "num_retries": costs.num_retries,
                "num_replays": costs.num_replays,
                "num_degraded_tokens": costs.num_degraded_tokens,
            }
            facts |= {name: count for name, count in rare.items() if count}
        return facts

    def _tokens_by_slot(self) -> dict[str, int]:
        """The answer's tokens by who wrote them, `router` for the router alone, `ensemble` for all experts."""
        slots = self._live.turn.slots
        counts = Counter(
            (record.source, record.expert) for record in (token.record for token in self._live.tokens)
        )
        return {
            slots[expert] if source is TokenSource.EXPERT else source.name.lower(): count
            for (source, expert), count in counts.most_common()
        }

    def _end_span(self, facts: dict[str, int | float], error: str) -> None:
        if self._span is not None:
            self._span.end(facts, error)
