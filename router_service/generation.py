"""The decode loop: ask, fuse, choose, remember, emit.

`TurnWriter` holds what one turn needs; `write` is the loop. The text is a pure function of tokens, turn and
checkpoint: clocks and other sessions decide only how many rows are asked for at a time, never what is made of them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import structlog
from prometheus_client import Counter

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.fusion import CombineRule
from fusionroute.sampling import Row, SeenTokens, choose
from fusionroute.telemetry import is_debugging
from router_service import metrics
from router_service.choosing import TokenChooser
from router_service.constraints import ConstrainedAnswer
from router_service.costs import Costs
from router_service.draft_experience import Spent
from router_service.draft_policy import DRAFT_PROBABILITY, TurnDrafting
from router_service.drafting import Drafter, DraftingMode, Lookup, Plan
from router_service.ensemble import Ensemble
from router_service.records import TokenRecord, TokenSource
from router_service.rounds import RoundAsker
from router_service.scores import Candidates, Round, Scores
from router_service.session_text import Text
from router_service.stored_session import FinishReason
from router_service.text import AnswerText
from router_service.token_log import TokenLog
from router_service.turn_request import Turn, Wishes

log = structlog.get_logger(__name__)

QUICK_ROW = 1024
LOOK_TOKENS = 8
"""Of every so many tokens one is compared with what models would have proposed, where that is not quick."""
Asked = TypeVar("Asked")
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
        constrained: which tokens may come next, advanced by the answer so far; None = all may.
    """

    ensemble: Ensemble
    turn: Turn
    wishes: Wishes
    text: Text
    answer_position: int
    answer_text: AnswerText
    log: TokenLog
    is_cancelled: Callable[[], bool]
    constrained: ConstrainedAnswer | None = None
    costs: Costs = field(default_factory=Costs)
    ending: Ending | None = None
    is_asking: bool = False
    """Whether the writer waits for a model, so that cancelling its task interrupts nothing else."""
    _chooser: TokenChooser = field(init=False)
    _asker: RoundAsker = field(init=False)
    _drafting: TurnDrafting = field(init=False)
    _is_usual: bool = field(init=False)
    _counters: dict[tuple[TokenSource, int], Counter] = field(default_factory=dict)
    _proposed: tuple[int, ...] = ()
    _asked_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._chooser = TokenChooser(self.turn, self.wishes, self.constrained)
        top_logits = self.ensemble.top_logits if self._chooser.can_be_short else 0
        self._asker = RoundAsker(self.ensemble, self.turn, self.text, self.costs, top_logits)
        is_usual = self._is_usual = self.turn.is_usual
        self._drafting = TurnDrafting(
            drafting_mode(self.turn, self.wishes),
            drafters_of(self.turn),
            self.ensemble.experience,
            Lookup(self.text.tokens),
            self.ensemble.early if is_usual else False,
            least_probability=0.0 if self.turn.sampling.temperature else DRAFT_PROBABILITY,
            end_ids=self._asker.end_ids,
            is_apart=self.turn.constraint is not None or not is_usual,
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
                    round_ = await self._interruptible(self._asker.ask(self._plan()))
                except FusionRouteError as error:
                    if error.reason is Reason.CONTEXT_FULL and self._num_written:
                        reason = FinishReason.CONTEXT
                        break
                    raise
                if round_ is None:
                    reason = FinishReason.CANCELLED
                    break
                self._asked_seconds, num_before = time.monotonic() - started, self._num_written
                for scores in round_.scores:
                    token = await self._next_token(scores, seen)
                    if token is None:
                        reason = FinishReason.CANCELLED
                        break
                    await self._until_there_is_room()
                    self.log.append(token.record)
                    self.text.tokens.append(token.record.token_id)
                    seen.add(token.record.token_id)
                    yield token
                    if self.constrained is not None:
                        await self.constrained.advance(token.record.token_id)
                    reason = self._reason_to_end()
                    if reason is not None or not self._came_true(round_, self._num_written - num_before):
                        break
                if self._num_written > num_before:
                    await self._learn(round_, self._num_written - num_before)
        self.costs.num_replays, self.costs.num_retries = self.text.num_replays, self.text.num_retries
        self.ending = Ending(reason, self.answer_text.finish(), self.answer_text.stop or "")

    async def _interruptible(self, asked: Awaitable[Asked]) -> Asked | None:
        """What models answer; None where the turn is cancelled meanwhile."""
        self.is_asking = True
        try:
            return await asked
        except asyncio.CancelledError:
            if not self.is_cancelled():
                raise
            _take_back_cancellation()
            return None
        finally:
            self.is_asking = False

    # --- rounds ----------------------------------------------------------------------------------------------------

    def _plan(self) -> Plan:
        lookup = self._drafting.lookup
        lookup.note_last()
        self._proposed = lookup.propose(1) if self._drafting.is_choosing else ()
        room = self.ensemble.max_context_tokens - len(self.text.tokens)
        num_left = min(self.turn.max_tokens - self._num_written, room)
        return self._drafting.plan(num_left, self._asker.can_ask_guess)

    def _came_true(self, round_: Round, num_tokens: int) -> bool:
        """Whether the last of a round's tokens is the one that the rows of the next are based on."""
        drafted = round_.draft[num_tokens - 1 : num_tokens]
        return drafted == (self.text.tokens[-1],)

    async def _learn(self, round_: Round, num_tokens: int) -> None:
        """What the round says about the next ones."""
        drafting, drafter, num_drafted = self._drafting, round_.plan.drafter, len(round_.draft)
        is_first, is_degraded = not drafting.num_seen, round_.scores[0].is_degraded
        if not is_first and not is_degraded and self._is_usual:  # these take what others do not
            spent = Spent(self._asked_seconds, round_.router_seconds, round_.expert_seconds)
            drafting.note_round(round_.plan, num_drafted, num_tokens, spent)
        if drafter is None or not num_drafted:
            await self._compare(round_.scores[0])
        else:
            num_accepted = num_tokens if self._came_true(round_, num_tokens) else num_tokens - 1
            for index in range(
                min(num_tokens, num_drafted)
            ):  # nothing behind the turn's last token was judged
                drafting.note_token(drafter, was_right=index < num_accepted)
            self.costs.note_draft(drafter, num_drafted, num_accepted)
            metrics.note_draft(drafter.value, num_drafted, num_accepted)
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
            if row is None or (position % LOOK_TOKENS and not self._is_quick(row, drafter)):
                continue
            is_guess = drafter is Drafter.ROUTER or scores.taken.expert == self._asker.guess
            sampling = self._asker.draft_sampling
            if self._chooser.is_slow(row):
                choice = await asyncio.to_thread(choose, row, sampling, position)
            else:
                choice = choose(row, sampling, position)
            if drafting.least_probability and choice.logprob < LEAST_LOGPROB:
                continue  # it would have stopped before
            drafting.note_token(drafter, was_right=is_guess and choice.token_id == written)

    def _is_quick(self, row: Row, drafter: Drafter) -> bool:
        """Whether a drafter's choice from a row costs next to nothing, or is worth it while little is known."""
        is_sampled = self.turn.sampling.temperature != 0.0
        return len(row) <= QUICK_ROW and not (is_sampled and self._drafting.is_well_known(drafter))

    # --- tokens ----------------------------------------------------------------------------------------------------

    async def _next_token(self, scores: Scores, seen: SeenTokens) -> WrittenToken | None:
        """The token that the rows give; None where the turn is cancelled while a whole row is asked for."""
        started, asked_before = time.monotonic(), self._asked_seconds
        choice, top = None, None
        if scores.short is not None:
            choice = await self._chooser.choose_short(scores, len(self.text.tokens), seen)
            whole = scores if choice is not None else await self._ask_whole(scores)
            if whole is None:
                return None
            scores = whole
        if choice is None:
            choice, top = await self._chooser.choose_whole(scores, len(self.text.tokens), seen)
        decision, is_degraded = scores.taken, scores.is_degraded
        if not scores.has_expert or decision.expert is None:
            source = TokenSource.ENSEMBLE if decision.others else TokenSource.ROUTER
            record = TokenRecord(choice.token_id, choice.logprob, source, degraded=is_degraded)
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
        seconds = time.monotonic() - started - (self._asked_seconds - asked_before)
        metrics.FUSE_SECONDS.observe(seconds)
        self.costs.fuse_seconds += seconds
        if not self.costs.first_token_seconds:
            self.costs.first_token_seconds = time.monotonic() - self.costs.started
            metrics.FIRST_TOKEN_SECONDS.observe(self.costs.first_token_seconds)
        self._count(record)
        return token

    async def _ask_whole(self, scores: Scores) -> Scores | None:
        """The same with the expert's whole row, which is part of what the round takes."""
        started = time.monotonic()
        whole = await self._interruptible(self._asker.ask_whole(scores))
        self._asked_seconds += time.monotonic() - started
        return whole

    def _count(self, record: TokenRecord) -> None:
        key = (record.source, record.expert)
        counter = self._counters.get(key)
        if counter is None:
            labels = (record.source.name.lower(), self._slot_of(record))
            counter = self._counters[key] = metrics.TOKENS.labels(*labels)
        counter.inc()
        if is_debugging():
            log.debug("token", index=self._num_written, slot=self._slot_of(record), degraded=record.degraded)

    def _slot_of(self, record: TokenRecord) -> str:
        return (
            self.turn.slots[record.expert] if record.source is TokenSource.EXPERT else metrics.ROUTER_ITSELF
        )

    async def _until_there_is_room(self) -> None:
        started = time.monotonic()
        await self.log.room()
        metrics.STORE_WAIT_SECONDS.observe(time.monotonic() - started)

    @property
    def _num_written(self) -> int:
        return len(self.text.tokens) - self.answer_position

    def _reason_to_end(self) -> FinishReason | None:
        """Whether the answer is complete, judged by its tokens alone, or cancelled."""
        if self.answer_text.stop:
            return FinishReason.STOP
        if self.constrained is not None and self.constrained.is_complete:
            return FinishReason.EOS
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
    drafters = [Drafter.LOOKUP]
    if turn.rule is CombineRule.ENSEMBLE:
        return tuple(drafters)
    if turn.rule is not CombineRule.ROUTER:
        drafters.append(Drafter.EXPERT)
    if turn.rule is not CombineRule.ROUTE:
        drafters.append(Drafter.ROUTER)
    return tuple(drafters)


def drafting_mode(turn: Turn, wishes: Wishes) -> DraftingMode:
    """Who may propose tokens: nothing that is measured of usual turns tells what drafts of others are worth."""
    if wishes.drafting is DraftingMode.AUTO and not turn.is_usual:
        return DraftingMode.OFF
    return wishes.drafting


def _take_back_cancellation() -> None:
    """The task was cancelled only to interrupt its waiting for a model; it goes on to close its turn."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
