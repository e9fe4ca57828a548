"""The decode loop: ask, fuse, choose, remember, emit.

`TurnWriter` holds what one turn needs; `write` is the loop. The text is a pure function of tokens, turn and
checkpoint: clocks and other sessions decide only how many rows are asked for at a time, never what is made of them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from functools import partial

import structlog

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.fusion import (
    Choice,
    CombineRule,
    Row,
    SeenTokens,
    choose,
    fuse,
)
from fusionroute.short_rows import can_choose, pick_if_certain
from fusionroute.telemetry import is_debugging
from router_service import metrics
from router_service.costs import Costs
from router_service.draft_policy import DRAFT_PROBABILITY, TurnDrafting
from router_service.drafting import Drafter, Lookup, Plan
from router_service.ensemble import Ensemble
from router_service.records import UNKNOWN_LOGPROB, TokenRecord, TokenSource
from router_service.rounds import RoundAsker
from router_service.scores import Candidates, Round, Scores
from router_service.session_text import Text
from router_service.stored_session import FinishReason
from router_service.text import AnswerText
from router_service.token_log import TokenLog
from router_service.turn_request import Turn, Wishes

log = structlog.get_logger(__name__)

LARGE_ROW = 16384
"""Sampling from rows longer than this takes milliseconds, which the event loop is spared."""
QUICK_ROW = 1024
LOOK_TOKENS = 8
"""Of every so many tokens one is compared with what models would have proposed, where rows are longer than that."""
LEAST_LOGPROB = math.log(DRAFT_PROBABILITY)


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
    wishes: Wishes
    text: Text
    answer_position: int
    answer_text: AnswerText
    log: TokenLog
    is_cancelled: Callable[[], bool]
    costs: Costs = field(default_factory=Costs)
    ending: Ending | None = None
    is_asking: bool = False
    """Whether the writer waits for a model, so that cancelling its task interrupts nothing else."""
    _asker: RoundAsker = field(init=False)
    _drafting: TurnDrafting = field(init=False)
    _proposed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        top_logits = self.ensemble.top_logits if self._can_be_short else 0
        self._asker = RoundAsker(self.ensemble, self.turn, self.text, self.costs, top_logits)
        self._drafting = TurnDrafting(
            self.wishes.drafting,
            drafters_of(self.turn),
            self.ensemble.experience,
            Lookup(self.text.tokens),
            self.ensemble.early,
            least_probability=0.0 if self.turn.sampling.temperature else DRAFT_PROBABILITY,
        )

    async def write(self) -> AsyncGenerator[WrittenToken, None]:
        """Yields the turn's further tokens; afterwards `ending` says how it ended."""
        seen = SeenTokens(self.text.tokens[: self.answer_position])
        for token_id in self.text.tokens[self.answer_position :]:
            seen.add(token_id)
        reason = self._reason_to_end()
        with self.ensemble.experience.one_more_turn():
            while reason is None:
                started = time.monotonic()
                try:
                    self.is_asking = True
                    round_ = await self._asker.ask(self._plan())
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
                asked_seconds, num_before = time.monotonic() - started, self._num_written
                for scores in round_.scores:
                    token = await self._next_token(scores, seen)
                    await self._until_there_is_room()
                    self.log.append(token.record)
                    self.text.tokens.append(token.record.token_id)
                    seen.add(token.record.token_id)
                    yield token
                    reason = self._reason_to_end()
                    if reason is not None or not self._came_true(round_, self._num_written - num_before):
                        break
                await self._learn(round_, self._num_written - num_before, asked_seconds)
        self.costs.num_replays, self.costs.num_retries = self.text.num_replays, self.text.num_retries
        self.ending = Ending(reason, self.answer_text.finish(), self.answer_text.stop or "")

    # --- rounds ----------------------------------------------------------------------------------------------------

    def _plan(self) -> Plan:
        lookup = self._drafting.lookup
        lookup.note_last()
        self._proposed = lookup.propose(1) if self._drafting.is_choosing else ()
        room = self.ensemble.max_context_tokens - len(self.text.tokens)
        num_left = min(self.turn.max_tokens - self._num_written, room)
        # Who is there is looked up only where it matters: that takes a look at every instance of a slot.
        can_be_early = self._drafting.looks_at_guess and self._asker.can_ask_guess()
        return self._drafting.plan(num_left, can_be_early=can_be_early)

    def _came_true(self, round_: Round, num_tokens: int) -> bool:
        """Whether the last of a round's tokens is the one that the rows of the next are based on."""
        drafted = round_.draft[num_tokens - 1 : num_tokens]
        return drafted == (self.text.tokens[-1],)

    async def _learn(self, round_: Round, num_tokens: int, seconds: float) -> None:
        """What the round says about the next ones."""
        drafting, drafter = self._drafting, round_.plan.drafter
        if drafter is None or not round_.draft:
            await self._compare(round_.scores[0])
            is_first, is_degraded = self._num_written == 1, round_.scores[0].is_degraded
            if not is_first and not is_degraded:  # which took what others do not
                drafting.experience.note_token(round_.plan, seconds, round_.router_seconds, round_.expert_seconds)
        else:
            num_accepted = num_tokens if self._came_true(round_, num_tokens) else num_tokens - 1
            drafting.experience.note_round(
                round_.plan, len(round_.draft), num_tokens, seconds, was_asked_for=drafting.mode.drafter is not None
            )
            for index in range(min(num_accepted + 1, len(round_.draft))):
                drafting.note_token(drafter, was_right=index < num_accepted)
            self.costs.note_draft(drafter, len(round_.draft), num_accepted)
            metrics.note_draft(drafter.value, len(round_.draft), num_accepted)
        drafting.num_seen += num_tokens
        self._asker.last_expert = round_.scores[num_tokens - 1].taken.expert

    async def _compare(self, scores: Scores) -> None:
        """Compares the token just written with what drafters would have proposed; costs no forward."""
        drafting = self._drafting
        if not drafting.is_choosing:
            return
        written, position = self.text.tokens[-1], len(self.text.tokens) - 1
        for drafter in drafting.drafters:
            if drafter is Drafter.LOOKUP:
                if self._proposed:
                    drafting.note_token(drafter, was_right=self._proposed[0] == written)
                continue
            row = scores.router if drafter is Drafter.ROUTER else scores.expert
            if row is None or (len(row) > QUICK_ROW and position % LOOK_TOKENS):
                continue
            is_guess = drafter is Drafter.ROUTER or scores.taken.expert == self._asker.guess
            sampling = self._asker.draft_sampling
            if self._is_slow(row):
                choice = await asyncio.to_thread(choose, row, sampling, position)
            else:
                choice = choose(row, sampling, position)
            if drafting.least_probability and choice.logprob < LEAST_LOGPROB:
                continue  # it would have stopped before
            drafting.note_token(drafter, was_right=is_guess and choice.token_id == written)

    def _is_slow(self, row: Row) -> bool:
        """Whether choosing from a row takes long enough to be kept off the event loop."""
        return len(row) > LARGE_ROW and self.turn.sampling.temperature != 0.0

    # --- tokens ----------------------------------------------------------------------------------------------------

    async def _next_token(self, scores: Scores, seen: SeenTokens) -> WrittenToken:
        started = time.monotonic()
        choice = await self._choose_short(scores, seen) if scores.short is not None else None
        if scores.short is not None and choice is None:
            scores = await scores.with_whole_row()
        choice, top = (choice, None) if choice is not None else await self._choose_whole(scores, seen)
        decision, is_degraded = scores.taken, scores.is_degraded
        if not scores.has_expert or decision.expert is None:
            record = TokenRecord(choice.token_id, choice.logprob, TokenSource.ROUTER, degraded=is_degraded)
        else:
            source = TokenSource.EXPERT
            record = TokenRecord(
                choice.token_id, choice.logprob, source, decision.expert, scores.epoch, is_degraded
            )
        self.costs.num_degraded_tokens += is_degraded
        token = WrittenToken(
            index=self._num_written,
            record=record,
            text=self.answer_text.push(choice.token_id),
            weights=tuple(decision.weights.tolist()) if self.wishes.routing_weights else (),
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

    async def _choose_whole(
        self, scores: Scores, seen: SeenTokens
    ) -> tuple[Choice, Candidates | None]:
        fused = fuse(self.turn.rule, scores.taken, scores.expert, scores.router)
        if self._is_slow(fused) or (self.wishes.num_top_candidates and len(fused) > LARGE_ROW):
            return await asyncio.to_thread(self._choose, fused, scores, seen)
        return self._choose(fused, scores, seen)

    def _choose(
        self, fused: Row, scores: Scores, seen: SeenTokens
    ) -> tuple[Choice, Candidates | None]:
        choice = choose(fused, self.turn.sampling, len(self.text.tokens), seen)
        count = self.wishes.num_top_candidates
        if not count:
            return choice, None
        return choice, scores.candidates(fused, count)

    @property
    def _can_be_short(self) -> bool:
        """Whether an expert's highest logits may suffice for this turn's tokens."""
        return can_choose(self.turn.sampling) and not (
            self.turn.rule is CombineRule.MIXTURE or self.wishes.num_top_candidates
        )

    async def _choose_short(self, scores: Scores, seen: SeenTokens) -> Choice | None:
        """The token as far as an expert's highest logits say it for certain; its probability they do not say."""
        assert scores.short is not None
        complement = scores.taken.complement
        router_row = None if self.turn.rule in (CombineRule.ROUTE, CombineRule.SELECT) else scores.router
        token_id = None
        if complement > 0.0:
            pick = partial(
                pick_if_certain,
                scores.short,
                router_row,
                self.turn.sampling,
                len(self.text.tokens),
                seen,
                complement=complement,
            )
            is_slow = scores.router is not None and self._is_slow(scores.router)
            token_id = await asyncio.to_thread(pick) if is_slow else pick()
        metrics.SHORT_REPLIES.labels("whole_row" if token_id is None else "certain").inc()
        return None if token_id is None else Choice(token_id, UNKNOWN_LOGPROB)

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


def drafters_of(turn: Turn) -> tuple[Drafter, ...]:
    """Who could propose tokens under a turn's rule."""
    has_router = not (turn.rule is CombineRule.ROUTE and turn.fixed_expert is not None)
    drafters = [Drafter.LOOKUP]
    if turn.rule is not CombineRule.ROUTER:
        drafters.append(Drafter.EXPERT)
    if has_router and turn.rule is not CombineRule.ROUTE:
        drafters.append(Drafter.ROUTER)
    return tuple(drafters)


def _take_back_cancellation() -> None:
    """The task was cancelled only to interrupt its waiting for a model; it goes on to close its turn."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
