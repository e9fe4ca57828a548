"""A reward chooses who writes: at each step the expert whose own way to the end promises most.

After Collab (Chakraborty et al. 2025, arXiv 2503.21720), a mixture of agents without training: the value of letting an
agent write the next token is the reward of the answer that it would complete by itself.

    prompt: 3+4 cm=     written so far    own greedy way to the end    reward
    math                7                 7                              0.2
    format              7                 7 cm                           1.3   <- writes the next `chunk_tokens`

What the method has and this has not: several candidates for the next token from each agent (here its greedy one), and
the penalty for departing from a reference policy.

An expert's way to the end stays what it is while what is written follows it, whoever wrote it: only the others are
asked again, at most n - 1 of n in each step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Unpack

from evaluation.questions import Answer, Question
from evaluation.systems.answering import Verify, to_json
from evaluation.systems.rewards import Candidate, Reward
from fusionroute.answers import Completion, FinishReason
from fusionroute.questions import Options, Prompt

ENDED = (FinishReason.EOS, FinishReason.STOP)


class Router(Protocol):
    """Who is asked for the experts' ways; a `RouterClient` is one."""

    async def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """A whole answer."""


class Codec(Protocol):
    """The experts' own tokens."""

    def encode(self, question: Question) -> list[int]:
        """The prompt of a question as the router would encode it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, without special ones."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """An answer as one expert would complete it.

    Attributes:
        ids: of the whole answer, what was written before included; the end of sequence too, if it has come.
        is_complete: whether it ended by itself.
    """

    ids: tuple[int, ...]
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Written:
    """What came of it.

    Attributes:
        ids: of the answer, with its end.
        experts: slot of each token's writer.
        num_steps: choices that were made.
        num_requests: ways to the end that experts were asked for.
    """

    ids: tuple[int, ...]
    experts: tuple[str, ...]
    is_complete: bool
    num_steps: int
    num_requests: int


@dataclass(frozen=True, slots=True)
class CollabWriter:
    """Answers of experts that take turns as a reward says.

    Attributes:
        slots: of the experts; of equal rewards the first one's counts.
        verify: judges an answer; called in a thread.
        chunk_tokens: what the chosen one writes before the next choice; 1 is the method.
        exact: experts answer with the same bits however requests are batched.
    """

    router: Router
    slots: Sequence[str]
    reward: Reward
    codec: Codec
    verify: Verify
    chunk_tokens: int = 1
    exact: bool = False

    async def write(self, question: Question) -> Written:
        """The answer, token by token. Raises FusionRouteError as the services do."""
        prompt = await asyncio.to_thread(self.codec.encode, question)
        ids: tuple[int, ...] = ()
        experts: list[str] = []
        rollouts: dict[str, Rollout] = {}
        num_requests = num_steps = 0
        is_complete = False
        while len(ids) < question.max_tokens:
            rollouts = {slot: each for slot, each in rollouts.items() if each.ids[: len(ids)] == ids}
            missing = [slot for slot in self.slots if slot not in rollouts]
            rollouts |= await self._asked(question, prompt, ids, missing)
            num_requests, num_steps = num_requests + len(missing), num_steps + 1
            chosen = await self._chosen(question, prompt, rollouts)
            way = rollouts[chosen]
            taken = way.ids[: len(ids) + self.chunk_tokens]
            experts += [chosen] * (len(taken) - len(ids))
            ids = taken
            if len(ids) == len(way.ids):
                is_complete = way.is_complete
                break
            if question.stop:
                is_complete = await asyncio.to_thread(self._is_stopped, question, prompt, ids)
            if is_complete:
                break
        return Written(ids, tuple(experts), is_complete, num_steps, num_requests)

    async def ask(self, question: Question) -> dict[str, Any]:
        """The answer and what the verifier says of it, as JSON has it, with `steps` and `requests`."""
        written = await self.write(question)
        text = await asyncio.to_thread(lambda: self._text(question, self.codec.encode(question), written.ids))
        answer = Answer(text, written.is_complete, len(written.ids), experts=written.experts)
        verdict = await asyncio.to_thread(self.verify, question, answer)
        return {**to_json(answer, verdict), "steps": written.num_steps, "requests": written.num_requests}

    async def _asked(
        self, question: Question, prompt: Sequence[int], ids: tuple[int, ...], slots: Sequence[str]
    ) -> dict[str, Rollout]:
        """Each of these experts' ways to the end, all asked at once."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    slot: group.create_task(self._rollout(question, prompt, ids, slot)) for slot in slots
                }
        except ExceptionGroup as errors:  # the first says why; the others were cancelled, or fail alike
            raise errors.exceptions[0] from None
        return {slot: task.result() for slot, task in tasks.items()}

    async def _rollout(
        self, question: Question, prompt: Sequence[int], ids: tuple[int, ...], slot: str
    ) -> Rollout:
        options: Options = {
            "combine": "route",
            "expert": slot,
            "temperature": 0.0,
            "seed": 0,
            "exact": self.exact,
            "max_tokens": question.max_tokens - len(ids),
        }
        if question.stop:
            options["stop"] = list(question.stop)
        completion = await self.router.complete([*prompt, *ids], **options)
        more = tuple(token.id for token in completion.tokens)
        return Rollout((*ids, *more), completion.finish_reason in ENDED)

    async def _chosen(self, question: Question, prompt: Sequence[int], rollouts: dict[str, Rollout]) -> str:
        """The slot whose way has the highest reward, the first of equals; equal ways are looked at once."""
        ways = list(dict.fromkeys(rollouts[slot] for slot in self.slots))
        if len(ways) == 1:
            return self.slots[0]

        def judge() -> list[float]:
            candidates = [Candidate(self._text(question, prompt, way.ids), way.is_complete) for way in ways]
            return self.reward.rewards(question, candidates)

        rewards = dict(zip(ways, await asyncio.to_thread(judge), strict=True))
        return max(self.slots, key=lambda slot: rewards[rollouts[slot]])

    def _text(self, question: Question, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """What the tokens add to the prompt, up to the first stop string."""
        text = self._whole_text(prompt, ids)
        cuts = [text.find(stop) for stop in question.stop if stop in text]
        return text[: min(cuts)] if cuts else text

    def _is_stopped(self, question: Question, prompt: Sequence[int], ids: Sequence[int]) -> bool:
        """Whether a stop string has come together from the tokens of several experts."""
        text = self._whole_text(prompt, ids)
        return any(stop in text for stop in question.stop)

    def _whole_text(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        return self.codec.decode([*prompt, *ids])[len(self.codec.decode(prompt)) :]
