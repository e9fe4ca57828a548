"""What systems are asked, and what they answered: the values that tasks, systems, verifiers and statistics share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Message = Mapping[str, str]
"""``{"role": "user", "content": "..."}``."""


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt with what a verifier needs to judge an answer.

    Attributes:
        id: ``TASK/...``, unique within a suite.
        task: name of the task, whose verifier judges.
        prompt: text, or messages for the chat template.
        reference: the gold answer as text, without an end-of-sequence token; "" where there is none.
        facts: whatever else the verifier needs, as JSON has it: tests, an entry point, instructions.
        cluster: what questions share that are right and wrong together, for example the fact they ask for;
            resampled as one.
        strata: subsets it belongs to, by the name of the division: ``{"group": "gap", "payload": "held-out"}``.
        max_tokens: of an answer.
        stop: an answer ends before the first of these.
    """

    id: str
    task: str
    prompt: str | tuple[Message, ...]
    reference: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = ""
    strata: Mapping[str, str] = field(default_factory=dict)
    max_tokens: int = 256
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a system wrote.

    Attributes:
        text: the whole answer.
        is_complete: whether it ended by itself, not by running out of tokens.
        num_tokens: its tokens, the end of sequence included; 0 where the system does not say.
        logprob: sum over its tokens of their log-probability under the system, natural; None where it is not known.
        experts: slot of the expert that took part in each token, "" for the router alone; empty where it is not known.
    """

    text: str
    is_complete: bool
    num_tokens: int = 0
    logprob: float | None = None
    experts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says.

    Attributes:
        score: 1 = right, 0 = wrong; between them only where a task says what that means.
        note: why it is wrong, in a few words; "" when right.
        parts: which of several demands are met, by name, where a task counts them apart; else empty.
    """

    score: float
    note: str = ""
    parts: Mapping[str, bool] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        """Whether nothing is missing."""
        return self.score >= 1.0


RIGHT = Verdict(1.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A system's answer to a question, judged.

    Attributes:
        question: what was asked.
        system: name of who was asked.
        seed: training seed of the models; 0 where there is one set of models.
    """

    question: Question
    system: str
    seed: int
    answer: Answer
    verdict: Verdict


def digest_of(questions: Iterable[Question]) -> str:
    """16 hexadecimal digits that tell one set of questions from another, in this order."""
    hasher = hashlib.sha256()
    for question in questions:
        hasher.update(json.dumps(asdict(question), sort_keys=True, ensure_ascii=False).encode())
    return hasher.hexdigest()[:16]


def check_unique(questions: Sequence[Question]) -> None:
    """Raises ValueError: two questions have the same id."""
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(f"two questions have the id {question.id!r}")
        seen.add(question.id)
