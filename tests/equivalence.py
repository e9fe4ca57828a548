"""Two hundred prompts with their reference answers, and the comparison that forgives float ties and counts them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fusionroute.fusion import CombineRule, Sampling
from fusionroute.v1.router_pb2 import ExpertChoice, GenerateRequest, SamplingParameters
from router_service.turn_request import RULE_MESSAGES
from tests.reference import Reference, ReferenceToken
from tests.served_stack import Answer
from tests.tiny_models import WIDTH

NUM_PROMPTS = 200
MAX_TOKENS = 14
FLOAT_MARGIN = 5e-5
"""Logits of cached and packed forwards differ from plain ones by less than this; closer candidates are a tie."""

RULES = ("sum", "sum", "gated_sum", "mixture", "select", "route")


@dataclass(frozen=True)
class Case:
    """A prompt, how to answer it, and the reference answer."""

    prompt: list[int]
    rule: str
    sampling: Sampling
    wanted: list[ReferenceToken]
    max_tokens: int = MAX_TOKENS
    ignore_eos: bool = False
    draws_experts: bool = False

    def request(self) -> GenerateRequest:
        """As an application would ask."""
        s = self.sampling
        return GenerateRequest(
            token_ids={"ids": self.prompt},
            combine=RULE_MESSAGES[CombineRule(self.rule)],
            expert_choice=ExpertChoice.EXPERT_CHOICE_RANDOM if self.draws_experts else None,
            sampling=SamplingParameters(
                max_tokens=self.max_tokens,
                ignore_eos=self.ignore_eos,
                temperature=s.temperature,
                top_k=s.top_k,
                top_p=s.top_p,
                min_p=s.min_p,
                repetition_penalty=s.repetition_penalty,
                presence_penalty=s.presence_penalty,
                frequency_penalty=s.frequency_penalty,
                logit_bias=s.logit_bias,
                seed=s.seed,
            ),
        )


def make_cases(
    reference: Reference,
    count: int = NUM_PROMPTS,
    *,
    max_tokens: int = MAX_TOKENS,
    seed: int = 7,
    rules: Sequence[str] = RULES,
    draws_experts: bool = False,
) -> list[Case]:
    """Half greedy, half sampled with all kinds of filters and penalties, over some rules.

    A reference without end ids makes cases that go on after the end of sequence, all of the same length.
    """
    rng = random.Random(seed)
    cases = []
    for number in range(count):
        prompt = [rng.randrange(2, WIDTH) for _ in range(rng.randrange(1, 30))]
        sampling = Sampling()
        if number % 2:
            # Halves and quarters are the same number in the message's float32.
            sampling = Sampling(
                temperature=rng.choice([0.5, 1.0, 2.0]),
                top_k=rng.choice([0, 0, 3, 20]),
                top_p=rng.choice([1.0, 0.75, 0.5]),
                min_p=rng.choice([0.0, 0.0, 0.125]),
                repetition_penalty=rng.choice([1.0, 1.5]),
                presence_penalty=rng.choice([0.0, 0.5]),
                frequency_penalty=rng.choice([0.0, 0.25]),
                logit_bias=rng.choice([{}, {5: 2.0, 9: -100.0}]),
                seed=rng.getrandbits(64),
            )
        rule = rules[number // 2 % len(rules)]
        wanted = reference.write(prompt, rule, sampling, max_tokens, draws_experts=draws_experts)
        ignore_eos = not reference.end_ids
        cases.append(Case(prompt, rule, sampling, wanted, max_tokens, ignore_eos, draws_experts))
    return cases


@dataclass
class Verdict:
    """How many answers were equal, and which were not."""

    num_equal: int = 0
    num_ties: int = 0
    different: list[str] = field(default_factory=list)

    def count(self, case: Case, answer: Answer) -> None:
        """Compares one answer, experts and log-probabilities included, up to its first float tie."""
        got = [(token.id, token.expert) for token in answer.tokens]
        for index, wanted in enumerate(case.wanted):
            if index < len(answer.ids) and answer.ids[index] == wanted.id:
                difference = abs(answer.tokens[index].logprob - wanted.logprob)
                if difference > 1e-3:
                    self.different.append(f"logprob off by {difference} at {index} of {case}")
                    return
                continue
            if wanted.margin < FLOAT_MARGIN:
                self.num_ties += 1
                return
            self.different.append(f"at {index}: {got} instead of {case}")
            return
        if len(answer.ids) != len(case.wanted):
            self.different.append(f"{len(answer.ids)} tokens {got} instead of {len(case.wanted)}: {case}")
            return
        self.num_equal += 1


async def compare(
    cases: list[Case],
    answer: Callable[[GenerateRequest], Awaitable[Answer]],
    num_concurrent: int,
    between: Callable[[int], Awaitable[None]] | None = None,
) -> Verdict:
    """Asks all cases, `num_concurrent` at a time; `between` hears after each how many are done."""
    verdict, done = Verdict(), 0
    gate = asyncio.Semaphore(num_concurrent)

    async def one(case: Case) -> None:
        nonlocal done
        async with gate:
            verdict.count(case, await answer(case.request()))
        done += 1
        if between is not None:
            await between(done)

    async with asyncio.TaskGroup() as group:
        for case in cases:
            group.create_task(one(case))
    return verdict


def assert_all_equal(verdict: Verdict, count: int) -> None:
    """No answer differs except by a float tie, and ties are rare; says how many there were."""
    print(f"{verdict.num_equal} equal, {verdict.num_ties} float ties within {FLOAT_MARGIN}")
    assert not verdict.different, verdict.different[:3]
    assert verdict.num_equal + verdict.num_ties == count
    assert verdict.num_ties <= count // 50


def assert_written_across_restarts(answers: list[Answer], slots: Iterable[str]) -> None:
    """Some answers were begun by one instance of an expert and ended by another, and no epoch tells which.

    An instance that goes on with an answer is sent all of it, which is counted as a replay: without evictions, nothing
    else is. Instances of equal weights share their slot's epoch, restarted or not.
    """
    num_replays = [each.finished.statistics.num_replays for each in answers if each.finished is not None]
    print(f"{sum(num_replays)} replays in {sum(number > 0 for number in num_replays)} answers")
    assert sum(num_replays) > 0
    pairs = {(token.expert, token.expert_epoch) for each in answers for token in each.tokens if token.expert}
    assert sorted(slot for slot, _ in pairs) == sorted(slots)
