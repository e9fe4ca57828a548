"""The questions of a suite's tasks, each with the verifier that judges its answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

from evaluation.questions import Question, check_unique
from evaluation.sandbox.box import Sandbox
from evaluation.sandbox.protection import Limits
from evaluation.suites.config import Suite, TaskKind, TaskTable, TextTable
from evaluation.suites.texts import LEAST_TOKENS, Text, load_texts
from evaluation.systems.answering import Verify
from evaluation.tasks.gsm8k import gsm8k_questions
from evaluation.tasks.humaneval import humaneval_questions
from evaluation.tasks.ifeval import ifeval_questions
from evaluation.tasks.jsonl import jsonl_questions
from evaluation.tasks.lab import lab_rounds
from evaluation.tasks.lab import verify as verify_lab
from evaluation.tasks.math500 import math500_questions
from evaluation.tasks.mbpp import Split, mbpp_questions
from evaluation.verifiers.by_name import VerifiersByName
from evaluation.verifiers.instructions.judging import verify as verify_instructions
from evaluation.verifiers.numbers import GoldKind
from fusionroute.errors import invalid
from fusionroute.lab.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAB_QUESTIONS_PER_TASK = 20
LEAST_TEXTS = 2


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task that can be asked.

    Attributes:
        title: in tables.
        verify: judges an answer to any of its questions.
    """

    title: str
    questions: Sequence[Question]
    verify: Verify


def loaded_tasks(suite: Suite, max_questions: int | None = None) -> list[LoadedTask]:
    """The tasks of a suite.

    Args:
        max_questions: of each task, at most; None = as the suite says.

    Raises:
        InvalidRequest: a file is not as it must be, naming file, line, field, value and limit; or programs would have
            to run where they cannot be locked in.
    """
    return [_loaded(table, max_questions) for table in suite.tasks]


def loaded_texts(suite: Suite, max_rows: int | None = None) -> list[Text]:
    """The texts of a suite. Raises InvalidRequest as `loaded_tasks`; OSError: there is no such tokenizer."""
    if not suite.texts:
        return []
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        suite.tokenizer, trust_remote_code=False
    )
    return [text for table in suite.texts for text in _texts(table, tokenizer, max_rows)]


def _texts(table: TextTable, tokenizer: PreTrainedTokenizerBase, max_rows: int | None) -> list[Text]:
    most = _least(table.max_rows, max_rows)
    texts = load_texts(table.file, table.name, tokenizer, max_tokens=table.max_tokens, max_rows=most)
    if len(texts) < LEAST_TEXTS:
        raise invalid(
            f"texts.{table.name}",
            f"{len(texts)} of {LEAST_TOKENS} tokens or more",
            f"at least {LEAST_TEXTS}: intervals take whole texts for draws",
        )
    return texts


def _loaded(table: TaskTable, max_questions: int | None) -> LoadedTask:
    most = _least(table.max_questions, max_questions)
    questions = [_titled(each, table) for each in islice(_questions(table), most)]
    check_unique(questions)
    return LoadedTask(table.title, questions, _verifier(table, questions))


def _questions(table: TaskTable) -> Iterable[Question]:
    path, kind = table.file, table.kind
    if path is None:
        # the tasks in turns, so that the first so many are of all of them
        num_rounds = max(LAB_QUESTIONS_PER_TASK, -(-(table.max_questions or 0) // len(TASKS)))
        return chain.from_iterable(lab_rounds(num_rounds))
    if kind is TaskKind.GSM8K:
        return gsm8k_questions(
            path, examples_path=table.examples_file, num_examples=table.num_examples or 0, chat=table.chat
        )
    if kind is TaskKind.MATH500:
        return math500_questions(path, only=GoldKind(table.gold) if table.gold else None, chat=table.chat)
    if kind is TaskKind.HUMANEVAL:
        return humaneval_questions(path, chat=table.chat)
    if kind is TaskKind.MBPP:
        num_examples = 3 if table.num_examples is None else table.num_examples
        split = Split[table.split.upper() or Split.TEST.name]
        return mbpp_questions(path, split=split, examples_path=table.examples_file, num_examples=num_examples)
    if kind is TaskKind.IFEVAL:
        return ifeval_questions(path)
    return jsonl_questions(path, task=table.title, verifier=table.verifier or "exact")


def _verifier(table: TaskTable, questions: Iterable[Question]) -> Verify:
    """Raises Unavailable: programs would have to run, and the kernel cannot lock them in."""
    if table.kind is TaskKind.IFEVAL:
        return verify_instructions
    if table.kind is TaskKind.LAB:
        return verify_lab
    limits = Limits(2.0 * table.cpu_seconds, table.cpu_seconds, table.memory_mib << 20)
    sandbox = Sandbox(limits, allow_weak=table.allow_weak_sandbox)
    if any(question.facts.get("verifier") == "code" for question in questions):
        sandbox.require()
    return VerifiersByName(sandbox).verify


def _titled(question: Question, table: TaskTable) -> Question:
    """Under the task's title, so that one benchmark may be asked twice in other ways."""
    changes: dict[str, object] = {"task": table.title, "id": f"{table.title}/{question.id}"}
    if table.max_tokens is not None:
        changes["max_tokens"] = table.max_tokens
    return replace(question, **changes)  # type: ignore[arg-type]


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
