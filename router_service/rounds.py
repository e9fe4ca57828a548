"""One round of a turn: the rows that score the next token, and with a draft those that score what follows it.

    nobody drafts     router, then the expert it has picked           one token
    asked early       router and the last token's expert together     one token
    router drafts     router continues itself, experts check          up to draft + 1 tokens
    expert drafts     the last expert continues, the router checks    up to draft + 1 tokens
    lookup            the text proposes, router and experts check     up to draft + 1 tokens

Under rules that take the rows of further models, each of these is asked at the same time, for every row.

Whatever the way, row j of a model is the one it gives after the text and the first j drafted tokens, so the tokens
that a round gives are those that single tokens would have given.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fusionroute import tracing
from fusionroute.background import end_task
from fusionroute.engine import Draft
from fusionroute.errors import FusionRouteError
from fusionroute.fusion import Decision, ExpertChoice, decide, needs_router
from fusionroute.sampling import NO_WEIGHTS, Row, Sampling
from router_service import metrics
from router_service.asking import Answer, Model, ask
from router_service.costs import Costs
from router_service.degrading import Policy, ask_expert
from router_service.drafting import Drafter, Plan, before_end
from router_service.ensemble import Ensemble
from router_service.scores import Round, Scores, scored
from router_service.session_text import NEXT_ROW, Text, Wanted
from router_service.turn_request import Turn

UNSURE_SECONDS = 0.5
"""Rows that may turn out not to be needed are not worth a longer wait."""


@dataclass(slots=True)
class RoundAsker:
    """Asks for the rows of a turn's rounds.

    Attributes:
        costs: what was asked and how long it took is added here.
        top_logits: so many of an expert's highest logits may come instead of its row; 0 = rows only.
        last_expert: who took part in the last token; None before the first, and where the router wrote it alone.
        unsure_seconds: how long one may be missed whom the router has not picked, or not for the next token.
    """

    ensemble: Ensemble
    turn: Turn
    text: Text
    costs: Costs
    top_logits: int = 0
    last_expert: int | None = None
    unsure_seconds: float = UNSURE_SECONDS
    _policy: Policy = field(init=False)
    _draft_of_models: Draft = field(init=False)
    _next_row: Wanted = field(init=False)
    _models: Sequence[Model] = field(init=False)
    _needs_router: bool = field(init=False)
    _is_drawn: bool = field(init=False)
    _traced: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        turn = self.turn
        self._policy = Policy(turn.rule, turn.on_expert_unavailable, self.ensemble.degrade_after_seconds)
        # Penalties and biases are left out: a draft need not be right.
        alike = replace(
            turn.sampling, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logit_bias={}
        )
        self._draft_of_models = Draft(1, alike, end_ids=self.end_ids)
        self._next_row = Wanted(exact=turn.exact, top_logits=self.top_logits)
        self._models = self.ensemble.models
        self._is_drawn = turn.expert_choice is ExpertChoice.RANDOM
        self._needs_router = needs_router(turn.rule, self._given_expert(0))

    @property
    def draft_sampling(self) -> Sampling:
        """How models choose what they draft."""
        return self._draft_of_models.sampling

    @property
    def needs_router(self) -> bool:
        """Whether tokens of this turn take a forward of the router."""
        return self._needs_router

    @property
    def guess(self) -> int | None:
        """The expert that will take part in the next token, as far as can be told before the router has routed."""
        given = self._given_expert(0)
        return self.last_expert if given is None else given

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end this turn's answer."""
        return frozenset() if self.turn.ignore_eos else self.ensemble.end_ids

    def can_ask_guess(self) -> bool:
        """Whether there is a guess and somebody serves it."""
        guess = self.guess
        return guess is not None and self.ensemble.experts[guess].can_be_asked(self.text)

    async def ask(self, plan: Plan) -> Round:
        """The rows of a round.

        Raises:
            FusionRouteError: the next token's rows cannot be had; what belongs to drafted tokens is left out instead.
        """
        known: dict[int, Answer] = {}
        draft = plan.ids
        costs = self.costs
        router_before, expert_before = costs.router_forward_seconds, costs.expert_forward_seconds
        if plan.drafter is Drafter.EXPERT:
            answer = await self._ask_guess(Wanted(drafting=self._drafting(plan), exact=self.turn.exact))
            if answer is not None:
                assert self.guess is not None
                known, draft = {self.guess: answer}, before_end(answer.drafted_ids, self.end_ids)
        early = self._begin_early() if plan.early else None
        try:
            router = await self._ask_router(plan, draft) if self._needs_router else None
            if router is not None:
                draft += before_end(router.drafted_ids, self.end_ids)
            round_ = Round(plan, draft)
            decisions = [self._decide(router, row) for row in range(len(draft) + 1)]
            if early is not None:
                await self._await_early(early, decisions[0], known)
            await self._fill(round_, decisions, router, known)
        finally:
            if early is not None:
                await end_task(early)
        round_.router_seconds = costs.router_forward_seconds - router_before
        round_.expert_seconds = costs.expert_forward_seconds - expert_before
        return round_

    async def ask_router_alone(self) -> Answer:
        """The router's row for the next token."""
        return await self._ask_router(Plan(), ())

    async def ask_whole(self, scores: Scores) -> Scores:
        """The same scores with the expert's whole row in place of its highest logits. Raises FusionRouteError."""
        started = time.monotonic()
        whole = await scores.with_whole_row()
        seconds = time.monotonic() - started
        metrics.EXPERT_WAIT_SECONDS.observe(seconds)
        self.costs.expert_seconds += seconds
        return whole

    # --- the router ------------------------------------------------------------------------------------------------

    async def _ask_router(self, plan: Plan, draft: Sequence[int]) -> Answer:
        started = time.monotonic()
        drafting = self._drafting(plan) if plan.drafter is Drafter.ROUTER else None
        wanted = NEXT_ROW
        if draft or drafting or self.turn.exact:
            wanted = Wanted(draft, range(len(draft) + 1), drafting, self.turn.exact)
        answer = await ask(self.ensemble.router, self.text, self.ensemble.router_patience, wanted)
        seconds = time.monotonic() - started
        metrics.ROUTER_FORWARD_SECONDS.observe(seconds)
        self._trace("router", seconds, answer)
        self.costs.router_seconds += seconds
        self.costs.router_forward_seconds += answer.forward_seconds
        self.costs.num_router_forwards += 1 + len(answer.drafted_ids)
        return answer

    def _decide(self, router: Answer | None, row: int) -> Decision:
        scores = None if router is None or router.head_scores is None else router.head_scores[row]
        return decide(self.turn.rule, self.ensemble.layout, scores, self._given_expert(row))

    def _given_expert(self, row: int) -> int | None:
        """The expert of a row where the router does not pick it."""
        if not self._is_drawn:
            return self.turn.fixed_expert
        return self.turn.given_expert(len(self.text.tokens) + row)

    # --- an expert before the router has routed --------------------------------------------------------------------

    def _begin_early(self) -> asyncio.Task[Answer | None]:
        self.costs.num_early_asks += 1
        return asyncio.create_task(self._ask_guess(self._next_row))

    async def _await_early(
        self, early: asyncio.Task[Answer | None], decision: Decision, known: dict[int, Answer]
    ) -> None:
        """The early answer, if it is the picked expert's; else it goes on beside the right one's, as its catch-up."""
        if decision.expert is None or decision.expert != self.guess:
            metrics.EARLY_ASKS.labels("miss").inc()
            self.costs.num_expert_calls += 1
            return
        metrics.EARLY_ASKS.labels("hit").inc()
        self.costs.num_early_hits += 1
        started = time.monotonic()
        answer = await early
        if answer is not None:
            known[decision.expert] = answer
            self._count_expert(time.monotonic() - started, answer)

    async def _ask_guess(self, wanted: Wanted) -> Answer | None:
        """Rows of the expert that is probably picked; None where it cannot be asked, which says nothing yet."""
        guess = self.guess
        assert guess is not None
        started = time.monotonic()
        patience = self.ensemble.expert_patience.while_absent(self.unsure_seconds, self.unsure_seconds)
        try:
            answer = await ask(self.ensemble.experts[guess], self.text, patience, wanted)
        except FusionRouteError:
            return None
        if wanted.drafting is not None:
            self._count_expert(time.monotonic() - started, answer)
        return answer

    # --- experts as the router has routed --------------------------------------------------------------------------

    async def _fill(
        self, round_: Round, decisions: Sequence[Decision], router: Answer | None, known: dict[int, Answer]
    ) -> None:
        """Asks the picked experts for what is not known yet, all at the same time; enters what could be had."""
        started, spent_seconds = time.monotonic(), self.costs.expert_seconds
        wanted: dict[int, list[int]] = {}
        for row, decision in enumerate(decisions):
            if decision.expert is not None and decision.expert not in known:
                wanted.setdefault(decision.expert, []).append(row)
        first = decisions[0]
        for other in first.others:  # the same ones for each row
            wanted[other] = list(range(len(decisions)))
        taken, stand_in = first, None
        tasks = {
            expert: asyncio.create_task(
                self._ask_needed(expert, self._wanted(round_, rows))
                if expert in first.others
                else self._ask_for_draft(expert, self._wanted(round_, rows))
            )
            for expert, rows in wanted.items()
            if expert != first.expert
        }
        rows_of: dict[int, Sequence[int]] = {expert: range(len(decisions)) for expert in known}
        rows_of |= wanted
        try:
            if first.expert in wanted:
                taken, stand_in = await self._ask_first(first, self._wanted(round_, wanted[first.expert]))
                if stand_in is not None and taken.expert == first.expert:
                    known[first.expert] = stand_in
            for expert, task in tasks.items():
                answer = await task
                if answer is not None:
                    known[expert] = answer
        finally:
            for task in tasks.values():
                await end_task(task)
        if first.others:
            seconds = time.monotonic() - started - (self.costs.expert_seconds - spent_seconds)
            self._count_others(max(0.0, seconds), [known[other] for other in first.others])
        elif taken.expert is None and router is None:
            router = await self.ask_router_alone()  # it was not needed beside the expert that is not there
        self._enter(round_, decisions, router, known, rows_of)
        if taken.expert != first.expert:
            router_row = None if router is None else router.rows[0]
            round_.scores = [scored(first, taken, router_row, stand_in, 0)]

    @staticmethod
    def _enter(
        round_: Round,
        decisions: Sequence[Decision],
        router: Answer | None,
        known: dict[int, Answer],
        rows_of: Mapping[int, Sequence[int]],
    ) -> None:
        """Scores row after row, up to the first one that is missing."""
        for row, decision in enumerate(decisions):
            router_row = None if router is None else router.rows[row]
            others: tuple[Row, ...] = ()
            if decision.others:
                others = tuple(known[each].rows[rows_of[each].index(row)] for each in decision.others)
            if decision.expert is None:
                round_.scores.append(scored(decision, decision, router_row, None, 0, others))
                continue
            answer = known.get(decision.expert)
            if answer is None:
                return
            place = rows_of[decision.expert].index(row)
            round_.scores.append(scored(decision, decision, router_row, answer, place, others))

    async def _ask_first(self, decision: Decision, wanted: Wanted) -> tuple[Decision, Answer | None]:
        """Rows of the expert that is picked for the next token, or the one of who stands in for it."""
        ensemble, started = self.ensemble, time.monotonic()
        taken, answer = await ask_expert(
            ensemble.experts, self.text, decision, self._policy, ensemble.expert_patience, wanted
        )
        self._count_expert(time.monotonic() - started, answer)
        return taken, answer

    async def _ask_needed(self, model: int, wanted: Wanted) -> Answer:
        """Rows of a further model, in place of which there can be no others."""
        alone = Decision(model, NO_WEIGHTS)
        patience = self.ensemble.expert_patience
        _, answer = await ask_expert(self._models, self.text, alone, self._policy, patience, wanted)
        assert answer is not None
        return answer

    async def _ask_for_draft(self, expert: int, wanted: Wanted) -> Answer | None:
        """Rows that matter only if the tokens before them come true; None where they cannot be had."""
        patience = self.ensemble.expert_patience.while_absent(self.unsure_seconds, self.unsure_seconds)
        try:
            answer = await ask(self.ensemble.experts[expert], self.text, patience, wanted)
        except FusionRouteError:
            return None
        self.costs.num_expert_calls += 1
        return answer

    def _wanted(self, round_: Round, rows: Sequence[int]) -> Wanted:
        if not round_.draft:
            return self._next_row
        return Wanted(round_.draft, rows, exact=self.turn.exact)

    def _drafting(self, plan: Plan) -> Draft:
        return replace(
            self._draft_of_models, num_tokens=plan.num_tokens, min_probability=plan.least_probability
        )

    # --- what it has cost ------------------------------------------------------------------------------------------

    def _count_expert(self, seconds: float, answer: Answer | None) -> None:
        self.costs.expert_seconds += seconds
        forward_seconds = 0.0 if answer is None else min(seconds, answer.forward_seconds)
        metrics.EXPERT_WAIT_SECONDS.observe(seconds - forward_seconds)
        if answer is not None:
            metrics.EXPERT_FORWARD_SECONDS.observe(forward_seconds)
            self._trace("expert", seconds, answer)
            self.costs.expert_forward_seconds += forward_seconds
            self.costs.num_expert_calls += 1

    def _count_others(self, seconds: float, answers: Sequence[Answer]) -> None:
        """Further models were waited for, all at the same time, for so long."""
        self._count_expert(seconds, max(answers, key=lambda answer: answer.forward_seconds))
        self.costs.num_expert_calls += len(answers) - 1

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
