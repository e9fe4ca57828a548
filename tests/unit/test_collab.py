"""A reward chooses who writes: against brute force, with a reward that knows, and how often experts are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from evaluation.questions import Answer, Question, Verdict
from evaluation.systems.collab import CollabWriter, Written
from evaluation.systems.rewards import Candidate, FunctionReward
from fusionroute.answers import AnswerToken, Completion, FinishReason, Statistics

SLOTS = ("math", "strings", "format")
END = 0
Ids = tuple[int, ...]


@dataclass
class Experts:
    """Random experts: each one's next token is a function of all tokens before it, and the same for the same seed.

    Attributes:
        asked: (slot, prompt) of each request.
    """

    seed: int
    width: int = 5
    asked: list[tuple[str, Ids]] = field(default_factory=list)

    def next(self, slot: str, ids: Ids) -> int:
        return Random(f"{self.seed} {slot} {ids}").randrange(self.width)

    def rest(self, slot: str, ids: Ids, max_tokens: int) -> Ids:
        more: list[int] = []
        while len(more) < max_tokens and END not in more:
            more.append(self.next(slot, (*ids, *more)))
        return tuple(more)

    async def complete(self, prompt: Any, **options: Any) -> Completion:
        assert (options["combine"], options["temperature"]) == ("route", 0.0)
        self.asked.append((options["expert"], tuple(prompt)))
        ids = self.rest(options["expert"], tuple(prompt), options["max_tokens"])
        tokens = tuple(AnswerToken(at, each, "", None, options["expert"]) for at, each in enumerate(ids))
        ending = FinishReason.EOS if END in ids else FinishReason.LENGTH
        return Completion("", tokens, ending, None, "", len(prompt), 0, "route", "", Statistics())


class Letters:
    """Tokens 1, 2, ... as letters a, b, ...; the end is none."""

    def encode(self, question: Question) -> list[int]:
        return [ord(letter) - 96 for letter in str(question.prompt)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(96 + each) for each in ids if each != END)


def right(question: Question, answer: Answer) -> Verdict:
    return Verdict(float(answer.text == question.reference and answer.is_complete))


def writer(experts: Experts, function: Any, chunk_tokens: int = 1) -> CollabWriter:
    return CollabWriter(experts, SLOTS, FunctionReward(function), Letters(), right, chunk_tokens)


def odd_reward(question: Question, candidate: Candidate) -> float:
    """Any function of the whole answer."""
    return Random(f"{question.prompt} {candidate.text} {candidate.is_complete}").random()


def brute_force(experts: Experts, question: Question, chunk_tokens: int) -> tuple[Ids, tuple[str, ...], bool]:
    """As the method is told: everybody writes to the end anew, at every step."""
    codec = Letters()
    prompt, ids, slots = tuple(codec.encode(question)), Ids(), list[str]()
    while True:
        ways = [
            (*ids, *experts.rest(slot, (*prompt, *ids), question.max_tokens - len(ids))) for slot in SLOTS
        ]
        rewards = [odd_reward(question, Candidate(codec.decode(way), END in way)) for way in ways]
        best = rewards.index(max(rewards))
        taken = ways[best][: len(ids) + chunk_tokens]
        slots += [SLOTS[best]] * (len(taken) - len(ids))
        ids = taken
        if END in ids or len(ids) == question.max_tokens:
            return ids, tuple(slots), END in ids


@pytest.mark.parametrize("chunk_tokens", [1, 3])
async def test_what_is_asked_again_only_where_it_may_differ_equals_brute_force(chunk_tokens: int):
    num_switches = 0
    for seed in range(60):
        experts = Experts(seed)
        question = Question("q", "t", "abc", max_tokens=9)
        written = await writer(experts, odd_reward, chunk_tokens).write(question)
        assert (written.ids, written.experts, written.is_complete) == brute_force(
            experts, question, chunk_tokens
        )
        num_switches += len(set(written.experts)) > 1
    assert num_switches > 10, "or there was nothing to choose"


async def test_a_reward_that_knows_finds_the_answer_that_no_expert_writes():
    num_found = 0
    for seed in range(60):
        experts = Experts(seed, width=9)
        gold: Ids = ()
        for slot, length in (("strings", 2), ("math", 2), ("format", 6)):  # one goes on where the other stops
            gold = (*gold, *experts.rest(slot, (1, *gold), length)) if END not in gold else gold
        alone = {experts.rest(slot, (1,), 10) for slot in SLOTS}
        if gold in alone or END not in gold:
            continue
        question = Question("q", "t", "a", reference=Letters().decode(gold), max_tokens=10)
        entry = await writer(experts, common_start).ask(question)
        assert entry["text"] == question.reference and entry["complete"] and entry["score"] == 1.0
        assert len(entry["experts"]) == entry["tokens"] == len(gold) and len(set(entry["experts"])) > 1
        num_found += 1
    assert num_found > 5


def common_start(question: Question, candidate: Candidate) -> float:
    """How much of the gold answer stands at the beginning; a little more where it ends there."""
    pairs = list(zip(question.reference, candidate.text, strict=False))
    same = next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
    return same + 0.5 * (candidate.is_complete and candidate.text == question.reference)


async def test_ways_that_go_on_as_written_are_not_asked_for_again():
    experts = Experts(3)
    question = Question("q", "t", "abc", max_tokens=8)
    written = await writer(experts, odd_reward).write(question)
    assert written.num_requests == len(experts.asked) == len(set(experts.asked)), (
        "nobody is asked the same twice"
    )
    assert len(SLOTS) < written.num_requests <= len(SLOTS) + (written.num_steps - 1) * (len(SLOTS) - 1)


async def test_experts_of_one_mind_are_asked_once_and_no_reward_is_needed():
    experts = Experts(3)
    alike = Experts(3)
    alike.next = lambda slot, ids: experts.next("math", ids)  # type: ignore[method-assign]
    written: Written = await writer(alike, lambda *_: pytest.fail("nothing to choose")).write(
        Question("q", "t", "ab", max_tokens=8)
    )
    assert written.num_requests == len(SLOTS) and set(written.experts) == {"math"}
    assert written.ids == experts.rest("math", (1, 2), 8)


async def test_a_stop_string_of_two_experts_tokens_ends_the_answer():
    turns: dict[str, dict[Ids, int]] = {"math": {(): 1, (1,): 4}, "strings": {(1,): 2}, "format": {}}
    experts = Experts(0)
    experts.next = lambda slot, ids: turns[slot].get(ids[1:], 3)  # type: ignore[method-assign]
    question = Question("q", "t", "z", reference="ab", max_tokens=6, stop=("ab",))
    entry = await writer(experts, lambda question, candidate: candidate.text == "").ask(question)
    assert (entry["text"], entry["complete"], entry["tokens"]) == ("", True, 2)
    assert entry["experts"] == ["math", "strings"]


async def test_what_an_expert_raises_is_raised():
    class Broken(Experts):
        async def complete(self, prompt: Any, **options: Any) -> Completion:
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        await writer(Broken(1), odd_reward).write(Question("q", "t", "a"))
