"""The questions of a suite's tasks, each with the verifier that judges its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from evaluation.questions import Question, check_unique
from evaluation.suites.config import Suite, TaskTable
from evaluation.suites.texts import Text, load_texts
from evaluation.systems.answering import Verify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAB_QUESTIONS_PER_TASK = 20


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


@contextmanager
def loaded_tasks(suite: Suite, max_questions: int | None = None) -> Iterator[list[LoadedTask]]:
    """The tasks of a suite; while the block lasts, programs of models can be run.

    Args:
        max_questions: of each task, at most; None = as the suite says.

    Raises:
        InvalidRequest: a file is not as it must be, naming file, line, field, value and limit; or programs would have
            to run where they cannot be locked in.
    """
    with ExitStack() as stack:
        yield [_loaded(table, max_questions, stack) for table in suite.tasks]


def loaded_texts(suite: Suite, max_rows: int | None = None) -> list[Text]:
    """The texts of a suite. Raises InvalidRequest as `loaded_tasks`; OSError: there is no such tokenizer."""
    if not suite.texts:
        return []
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(suite.tokenizer, trust_remote_code=False)
    return [
        text
        for table in suite.texts
        for text in load_texts(
            table.file,
            table.name,
            tokenizer,
            max_tokens=table.max_tokens,
            max_rows=_least(table.max_rows, max_rows),
        )
    ]


def _loaded(table: TaskTable, max_questions: int | None, stack: ExitStack) -> LoadedTask:
    most = _least(table.max_questions, max_questions)
    questions = [_titled(each, table) for each in islice(_questions(table), most)]
    check_unique(questions)
    return LoadedTask(table.title, questions, _verifier(table, questions, stack))


def _titled(question: Question, table: TaskTable) -> Question:
    """Under the task's title, so that one benchmark may be asked twice in other ways."""
    changes: dict[str, object] = {"task": table.title, "id": f"{table.title}/{question.id}"}
    if table.max_tokens is not None:
        changes["max_tokens"] = table.max_tokens
    return replace(question, **changes)  # type: ignore[arg-type]


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
