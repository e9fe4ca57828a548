"""Lets a router write answers in one of its ways."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from evaluation.questions import Answer, Outcome, Question, Verdict
from evaluation.systems.ways import Way
from fusionroute.answers import Completion, FinishReason
from fusionroute.client import RouterClient
from fusionroute.questions import Options

Verify = Callable[[Question, Answer], Verdict]


@dataclass(frozen=True, slots=True)
class RouterWriter:
    """Answers of the running services.

    Attributes:
        verify: judges an answer; called in a thread, because running code takes long.
        sampling: further options of the requests, for example temperature and seed; greedy without.
    """

    router: RouterClient
    way: Way
    verify: Verify
    sampling: Options = field(default_factory=lambda: Options(temperature=0.0, seed=0))

    async def complete(self, question: Question) -> Completion:
        """What the services write. Raises FusionRouteError as they do."""
        options: Any = {**self.way.options(), **self.sampling, "max_tokens": question.max_tokens}
        if question.stop:
            options["stop"] = list(question.stop)
        prompt = question.prompt if isinstance(question.prompt, str) else list(question.prompt)
        return await self.router.complete(prompt, **options)

    async def outcome(self, question: Question) -> Outcome:
        """The answer, judged; of training seed 0."""
        answer = answer_of(await self.complete(question))
        verdict = await asyncio.to_thread(self.verify, question, answer)
        return Outcome(question, self.way.name, 0, answer, verdict)

    async def ask(self, question: Question) -> dict[str, Any]:
        """The answer and what the verifier says of it, as JSON has it."""
        completion = await self.complete(question)
        answer = answer_of(completion)
        verdict = await asyncio.to_thread(self.verify, question, answer)
        entropies = [
            round(entropy(token.routing_weights), 4) for token in completion.tokens if token.routing_weights
        ]
        return {**to_json(answer, verdict), "entropies": entropies}


def entropy(weights: Sequence[float]) -> float:
    """Of probabilities, in nats."""
    return -sum(weight * math.log(weight) for weight in weights if weight > 0.0)


def answer_of(completion: Completion) -> Answer:
    """What counts of a completion."""
    logprobs = [token.logprob for token in completion.tokens]
    known = [value for value in logprobs if value is not None]
    return Answer(
        text=completion.text,
        is_complete=completion.finish_reason in (FinishReason.EOS, FinishReason.STOP),
        num_tokens=len(completion.tokens),
        logprob=sum(known) if len(known) == len(logprobs) else None,
        experts=tuple(token.expert or "" for token in completion.tokens),
    )


def to_json(answer: Answer, verdict: Verdict) -> dict[str, Any]:
    """Plain values; the log-probability with five decimals."""
    return {
        "text": answer.text,
        "complete": answer.is_complete,
        "tokens": answer.num_tokens,
        "logprob": None if answer.logprob is None else round(answer.logprob, 5),
        "experts": list(answer.experts),
        "score": verdict.score,
        "note": verdict.note,
        "parts": dict(verdict.parts),
    }


def from_json(values: dict[str, Any]) -> tuple[Answer, Verdict]:
    """What `to_json` wrote. Raises KeyError: it did not."""
    answer = Answer(
        values["text"], values["complete"], values["tokens"], values["logprob"], tuple(values["experts"])
    )
    return answer, Verdict(values["score"], values["note"], values["parts"])
