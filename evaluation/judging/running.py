"""Asking a judge about every pair, in both orders, several at a time; what is known already is not asked again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from evaluation.judging.journal import JudgingJournal
from evaluation.judging.judgements import NUM_ATTEMPTS, Ask, Judgement, Order, last_judgements
from evaluation.judging.pairs import AnswerPair, digest_of
from evaluation.judging.prompting import JudgePrompt, read_choice
from fusionroute.errors import InvalidRequest, Reason
from fusionroute.remote_models import RemoteAnswer, RemoteEnding, RemoteSampling

RETRY_TEMPERATURE = 0.7
"""At least: greedy words would be the same under any seed."""


class Model(Protocol):
    """Whoever replies to messages; a `RemoteModel` does."""

    @property
    def identity(self) -> str:
        """Whose words these are."""

    async def generate(
        self, prompt: Sequence[Mapping[str, str]], sampling: RemoteSampling, /
    ) -> RemoteAnswer:
        """The reply."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a judge is asked.

    Attributes:
        seed: of the first repeat; further ones and second attempts have seeds of their own that follow from it.
        num_repeats: judgements of each pair in each order.
        temperature: 0 = greedy; then repeats differ only where a server is not the same twice.
        max_tokens: of a reply.
        num_concurrent: questions at the same time.
    """

    prompt: JudgePrompt = field(default_factory=JudgePrompt)
    seed: int = 0
    num_repeats: int = 1
    temperature: float = 0.0
    max_tokens: int = 512
    num_concurrent: int = 8

    def seed_of(self, repeat: int, attempt: int) -> int:
        """Of one attempt, the same for all pairs and both orders."""
        return self.seed + NUM_ATTEMPTS * repeat + attempt

    def facts(self, model: Model, pairs: Sequence[AnswerPair]) -> dict[str, Any]:
        """All that decides what is replied, for the journal."""
        return {
            "judge": model.identity,
            "template": self.prompt.digest,
            "reply_form": self.prompt.form.value,
            "seed": self.seed,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "pairs": digest_of(pairs),
        }


OnProgress = Callable[[int, int], None]
"""Is told how many asks are finished, and how many there are."""


def asks_of(pairs: Sequence[AnswerPair], plan: Plan) -> list[Ask]:
    """Every question; all of one repeat before the next, both orders of a pair one after the other.

    Nobody is asked to choose between an answer and itself.
    """
    unlike = [pair for pair in pairs if not pair.is_same]
    return [
        Ask(pair.id, order, repeat)
        for repeat in range(plan.num_repeats)
        for pair in unlike
        for order in Order
    ]


async def judge_pairs(
    model: Model, pairs: Sequence[AnswerPair], plan: Plan, journal: JudgingJournal, on_progress: OnProgress
) -> None:
    """Asks until every ask has its last judgement in the journal.

    A question that is too long for the judge is noted as refused. Cancelled, or after an error, what was replied is
    in the journal.

    Raises:
        ExceptionGroup: of the errors of `Model.generate`: the judge refuses requests, or stays away.
    """
    asks, by_id = asks_of(pairs, plan), {pair.id: pair for pair in pairs}
    known = last_judgements(journal.judgements)
    open_asks = [ask for ask in asks if ask not in known or not known[ask].is_last]
    num_done = len(asks) - len(open_asks)
    on_progress(num_done, len(asks))

    async def work(waiting: Iterator[Ask]) -> None:
        nonlocal num_done
        for ask in waiting:
            earlier = known.get(ask)
            first = 0 if earlier is None else earlier.attempt + 1
            for attempt in range(first, NUM_ATTEMPTS):
                judgement = await _judged(model, by_id[ask.pair], ask, attempt, plan)
                journal.add(judgement)
                if judgement.is_last:
                    break
            num_done += 1
            on_progress(num_done, len(asks))

    waiting = iter(open_asks)
    async with asyncio.TaskGroup() as group:
        for _ in range(min(plan.num_concurrent, len(open_asks))):
            group.create_task(work(waiting))


async def _judged(model: Model, pair: AnswerPair, ask: Ask, attempt: int, plan: Plan) -> Judgement:
    temperature = plan.temperature if attempt == 0 else max(plan.temperature, RETRY_TEMPERATURE)
    sampling = RemoteSampling(
        plan.max_tokens,
        temperature=temperature,
        seed=plan.seed_of(ask.repeat, attempt),
        json_schema=plan.prompt.form.json_schema,
    )
    shown = (pair.first, pair.second) if ask.order is Order.FIRST_AS_A else (pair.second, pair.first)
    messages = [{"role": "user", "content": plan.prompt.filled(pair.prompt, *shown)}]
    seed = plan.seed_of(ask.repeat, attempt)
    try:
        reply = await model.generate(messages, sampling)
    except InvalidRequest as error:
        if error.reason is not Reason.CONTEXT_FULL:
            raise
        return Judgement(ask, attempt, seed, temperature, None, error.message)
    choice = read_choice(reply.text, plan.prompt.form)
    return Judgement(ask, attempt, seed, temperature, choice, reply.text, reply.ending is RemoteEnding.CUT)
