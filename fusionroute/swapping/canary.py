"""Whether a new expert writes about as well as the old one: how likely each finds given answers to given prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Protocol

from fusionroute.errors import invalid

NUM_PROMPTS = 8
PROMPT_TOKENS = 4
ANSWER_TOKENS = 24
MAX_SAMPLES = 256
SEED = 20251122
DEFAULT_MARGIN_NATS = 0.5


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and its answer as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Scorer(Protocol):
    """What the canary asks of an expert."""

    async def continue_greedily(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """What it would write."""

    async def answer_log_probs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """The log-probs of all answers' tokens."""


@dataclass(frozen=True, slots=True)
class Canary:
    """How a new expert is compared.

    Attributes:
        samples: prompts and answers; none = what the old expert writes after prompts of random tokens.
        margin_nats: how much less likely, per token, the new one may find the answers.
    """

    samples: tuple[Sample, ...] = ()
    margin_nats: float = DEFAULT_MARGIN_NATS


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean log-prob of an answer's token, in nats, by the old and the new expert."""

    old_nats: float
    new_nats: float
    margin_nats: float
    num_tokens: int

    @property
    def is_worse(self) -> bool:
        """Whether the new expert is worse by more than the margin. True where it gives no number."""
        return not self.new_nats >= self.old_nats - self.margin_nats

    def __str__(self) -> str:
        return (
            f"{self.new_nats:.3f} nats per token, {self.old_nats:.3f} of the old one, "
            f"margin {self.margin_nats:g}, {self.num_tokens} tokens"
        )


async def compare(canary: Canary, old: Scorer, new: Scorer, logits_width: int) -> Comparison:
    """Scores the same answers by both. Raises FusionRouteError as the experts mean it."""
    samples = canary.samples or await _samples_of(old, logits_width)
    pairs = [(sample.prompt, sample.answer) for sample in samples]
    by_old, by_new = await old.answer_log_probs(pairs), await new.answer_log_probs(pairs)
    assert len(by_old) == len(by_new) == sum(len(sample.answer) for sample in samples)
    return Comparison(fmean(by_old), fmean(by_new), canary.margin_nats, len(by_old))


def read_samples(path: Path, encode: Callable[[str], Sequence[int]]) -> tuple[Sample, ...]:
    """Samples of a file with one JSON object {"prompt": ..., "answer": ...} a line.

    Raises:
        InvalidRequest: naming the line.
    """
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            prompt, answer = str(fields["prompt"]), str(fields["answer"])
        except (ValueError, KeyError, TypeError):
            limit = 'a JSON object with "prompt" and "answer"'
            raise invalid(f"{path.name}, line {number}", line[:80], limit) from None
        sample = Sample(tuple(encode(prompt)), tuple(encode(answer)))
        if not sample.prompt or not sample.answer:
            raise invalid(f"{path.name}, line {number}", line[:80], "at least one token on either side")
        samples.append(sample)
    if not 1 <= len(samples) <= MAX_SAMPLES:
        raise invalid(path.name, f"{len(samples)} lines", f"1 to {MAX_SAMPLES} lines")
    return tuple(samples)


async def _samples_of(expert: Scorer, logits_width: int) -> tuple[Sample, ...]:
    """What an expert writes after the same prompts of random tokens each time."""
    chooser = random.Random(SEED)  # noqa: S311 - no secret
    samples = []
    for _ in range(NUM_PROMPTS):
        prompt = tuple(chooser.randrange(logits_width) for _ in range(PROMPT_TOKENS))
        samples.append(Sample(prompt, tuple(await expert.continue_greedily(prompt, ANSWER_TOKENS))))
    return tuple(samples)
