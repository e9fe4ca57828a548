"""The decode loop: ask, fuse, choose, remember, emit.

`TurnWriter` holds what one turn needs; `write` is the loop. The text is a pure function of tokens, turn and
checkpoint: nothing in here looks at a clock, at other sessions or at how often something had to be asked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import structlog

from fusionroute import tracing
from fusionroute.errors import FusionRouteError, Reason
from fusionroute.fusion import (
    Choice,
    Decision,
    HeadLayout,
    Row,
    SeenTokens,
    choose,
    decide,
    fuse,
    needs_router,
    top_candidates,
)
from fusionroute.telemetry import is_debugging
from router_service import metrics
from router_service.asking import Answer, Model, Patience, ask
from router_service.degrading import Policy, ask_expert
from router_service.records import TokenRecord, TokenSource
from router_service.session_text import Text
from router_service.stored_session import FinishReason
from router_service.text import AnswerText
from router_service.token_log import TokenLog
from router_service.turn_request import Showing, Turn

log = structlog.get_logger(__name__)

LARGE_ROW = 16384
"""Sampling from rows longer than this takes milliseconds, which the event loop is spared."""


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Who can be asked: the router and the experts in the checkpoint's order.

    Attributes:
        end_ids: ids that end an answer.
        max_context_tokens: longest session.
        router_patience: for a row of the router.
        expert_patience: for a row of an expert.
        degrade_after_seconds: how long an expert may be missed before another way is gone, where the turn allows it.
    """

    router: Model
    experts: Sequence[Model]
    layout: HeadLayout
    end_ids: frozenset[int]
    max_context_tokens: int
    router_patience: Patience
    expert_patience: Patience
    degrade_after_seconds: float


@dataclass(slots=True)
class Costs:
    """What a turn has cost so far; seconds on the clock of time.monotonic()."""

    started: float = field(default_factory=time.monotonic)
    first_token_seconds: float = 0.0
    num_router_forwards: int = 0
    num_expert_calls: int = 0
    router_seconds: float = 0.0
    expert_seconds: float = 0.0
    expert_forward_seconds: float = 0.0
    fuse_seconds: float = 0.0
    num_replays: int = 0
    num_retries: int = 0
    num_degraded_tokens: int = 0
    store_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Candidates:
    """Best ids with their log-probabilities, by whom."""

    fused: list[Choice]
    expert: list[Choice]
    router: list[Choice]


@dataclass(frozen=True, slots=True)
class WrittenToken:
    """A token of the answer with what is told of it."""

    index: int
    record: TokenRecord
    text: str
    weights: tuple[float, ...] = ()
    top: Candidates | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a turn ended, and the text that was held back until then."""

    reason: FinishReason
    text: str
    stop: str


@dataclass(slots=True)
class TurnWriter:
    """Writes one turn.

    Attributes:
        text: the session's tokens; the answer so far is part of it.
        answer_position: where the answer begins.
        answer_text: turns the answer's ids into text.
        log: takes each token on its way to the store.
        is_cancelled: asked before each token.
    """

    ensemble: Ensemble
    turn: Turn
    showing: Showing
    text: Text
    answer_position: int
    answer_text: AnswerText
    log: TokenLog
    is_cancelled: Callable[[], bool]
    costs: Costs = field(default_factory=Costs)
    ending: Ending | None = None
    _policy: Policy = field(init=False)
    _traced: set[str] = field(default_factory=set)
    is_asking: bool = False
    """Whether the writer waits for a model, so that cancelling its task interrupts nothing else."""

    def __post_init__(self) -> None:
        self._policy = Policy(
            self.turn.rule, self.turn.on_expert_unavailable, self.ensemble.degrade_after_seconds
        )

    async def write(self) -> AsyncGenerator[WrittenToken, None]:
        """Yields the turn's further tokens; afterwards `ending` says how it ended."""
        seen = SeenTokens(self.text.tokens[: self.answer_position])
        for token_id in self.text.tokens[self.answer_position :]:
            seen.add(token_id)
        reason = self._reason_to_end()
        while reason is None:
            try:
                self.is_asking = True
                router = await self._ask_router() if self._needs_router else None
                decision = decide(
                    self.turn.rule,
                    self.ensemble.layout,
                    None if router is None or router.head_scores is None else router.head_scores[0],
                    self.turn.fixed_expert,
                )
                taken, expert = await self._ask_expert(decision)
                if router is None and expert is None:
                    router = await self._ask_router()  # it was not needed beside the expert that is not there
            except FusionRouteError as error:
                if error.reason is Reason.CONTEXT_FULL and self._num_written:
                    reason = FinishReason.CONTEXT
                    break
                raise
            except asyncio.CancelledError:
                if not self.is_cancelled():
                    raise
                _take_back_cancellation()
                reason = FinishReason.CANCELLED
                break
            finally:
                self.is_asking = False
            is_degraded = taken.expert != decision.expert
            token = await self._next_token(router, expert, taken, seen, is_degraded=is_degraded)
            await self._until_there_is_room()
            self.log.append(token.record)
            self.text.tokens.append(token.record.token_id)
            seen.add(token.record.token_id)
            yield token
            reason = self._reason_to_end()
        self.costs.num_replays, self.costs.num_retries = self.text.num_replays, self.text.num_retries
        self.ending = Ending(reason, self.answer_text.finish(), self.answer_text.stop or "")

    @property
    def _needs_router(self) -> bool:
        return needs_router(self.turn.rule, self.turn.fixed_expert)

    async def _ask_router(self) -> Answer:
        started = time.monotonic()
        answer = await ask(self.ensemble.router, self.text, self.ensemble.router_patience)
        seconds = time.monotonic() - started
        metrics.ROUTER_FORWARD_SECONDS.observe(seconds)
        self._trace("router", seconds, answer)
        self.costs.router_seconds += seconds
        self.costs.num_router_forwards += 1
        return answer

    async def _ask_expert(self, decision: Decision) -> tuple[Decision, Answer | None]:
        """The expert's row, and the decision as it was carried out: another one where the picked one is missing."""
        if decision.expert is None:
            return decision, None
        ensemble, started = self.ensemble, time.monotonic()
        taken, answer = await ask_expert(
            ensemble.experts, self.text, decision, self._policy, ensemble.expert_patience
        )
        seconds = time.monotonic() - started
        self.costs.expert_seconds += seconds
        metrics.EXPERT_WAIT_SECONDS.observe(seconds - (0.0 if answer is None else answer.forward_seconds))
        if answer is not None:
            metrics.EXPERT_FORWARD_SECONDS.observe(answer.forward_seconds)
            self._trace("expert", seconds, answer)
            self.costs.expert_forward_seconds += answer.forward_seconds
            self.costs.num_expert_calls += 1
        return taken, answer

    async def _next_token(
        self,
        router: Answer | None,
        expert: Answer | None,
        decision: Decision,
        seen: SeenTokens,
        *,
        is_degraded: bool,
    ) -> WrittenToken:
        started = time.monotonic()
        router_row = None if router is None else router.rows[0]
        expert_row = None if expert is None else expert.rows[0]
        fused = fuse(self.turn.rule, decision, expert_row, router_row)
        if len(fused) > LARGE_ROW and (self.turn.sampling.temperature or self.showing.num_top_candidates):
            choice, top = await asyncio.to_thread(self._choose, fused, expert_row, router_row, seen)
        else:
            choice, top = self._choose(fused, expert_row, router_row, seen)
        if expert is None or decision.expert is None:
            record = TokenRecord(choice.token_id, choice.logprob, TokenSource.ROUTER, degraded=is_degraded)
        else:
            record = TokenRecord(
                choice.token_id,
                choice.logprob,
                TokenSource.EXPERT,
                decision.expert,
                expert.epoch,
                is_degraded,
            )
        self.costs.num_degraded_tokens += is_degraded
        token = WrittenToken(
            index=self._num_written,
            record=record,
            text=self.answer_text.push(choice.token_id),
            weights=tuple(decision.weights.tolist()) if self.showing.routing_weights else (),
            top=top,
        )
        seconds = time.monotonic() - started
        metrics.FUSE_SECONDS.observe(seconds)
        self.costs.fuse_seconds += seconds
        if not self.costs.first_token_seconds:
            self.costs.first_token_seconds = time.monotonic() - self.costs.started
            metrics.FIRST_TOKEN_SECONDS.observe(self.costs.first_token_seconds)
        self._count(record)
        return token

    def _count(self, record: TokenRecord) -> None:
        by_expert = record.source is TokenSource.EXPERT
        slot = self.turn.slots[record.expert] if by_expert else metrics.ROUTER_ITSELF
        metrics.TOKENS.labels("expert" if by_expert else "router", slot).inc()
        if is_debugging():
            log.debug("token", index=self._num_written, slot=slot, degraded=record.degraded)

    async def _until_there_is_room(self) -> None:
        started = time.monotonic()
        await self.log.room()
        metrics.STORE_WAIT_SECONDS.observe(time.monotonic() - started)

    def _trace(self, who: str, seconds: float, answer: Answer) -> None:
        """The first row of each cache, which is its prefill, and slow ones."""
        if tracing.is_on() and (answer.cache not in self._traced or seconds > tracing.SLOW_SECONDS):
            facts: tracing.Attributes = {
                "cache": answer.cache,
                "position": len(self.text.tokens),
                "forward_seconds": answer.forward_seconds,
            }
            tracing.note(f"row of {who}", seconds, facts)
            self._traced.add(answer.cache)

    def _choose(
        self, fused: Row, expert_row: Row | None, router_row: Row | None, seen: SeenTokens
    ) -> tuple[Choice, Candidates | None]:
        choice = choose(fused, self.turn.sampling, len(self.text.tokens), seen)
        count = self.showing.num_top_candidates
        if not count:
            return choice, None
        return choice, Candidates(
            fused=top_candidates(fused, count),
            expert=[] if expert_row is None else top_candidates(expert_row, count),
            router=[] if router_row is None else top_candidates(router_row, count),
        )

    @property
    def _num_written(self) -> int:
        return len(self.text.tokens) - self.answer_position

    def _reason_to_end(self) -> FinishReason | None:
        """Whether the answer is complete, judged by its tokens alone, or cancelled."""
        if self.answer_text.stop:
            return FinishReason.STOP
        if self._num_written:
            if self.text.tokens[-1] in self.ensemble.end_ids and not self.turn.ignore_eos:
                return FinishReason.EOS
            if self._num_written >= self.turn.max_tokens:
                return FinishReason.LENGTH
            if len(self.text.tokens) >= self.ensemble.max_context_tokens:
                return FinishReason.CONTEXT
        if self.is_cancelled() or self.log.cancel_requested:
            return FinishReason.CANCELLED
        return None


def _take_back_cancellation() -> None:
    """The task was cancelled only to interrupt its waiting for a model; it goes on to close its turn."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
