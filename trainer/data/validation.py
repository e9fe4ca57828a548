"""Looking through a data set before a long run: every problem, what becomes of long rows, and how a row looks."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from trainer.config import DataTable
from trainer.data.encoding import Encoded
from trainer.data.loading import STAGE
from trainer.data.preparing import Fate, PreparedPrompt, PreparedRow, prepare_prompts, prepare_rows
from trainer.data.problems import Problem
from trainer.pace import Pace
from trainer.run_context import RunContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PROBLEMS = 20
MAX_EXAMPLES = 2
LENGTH_POINTS = {"shortest": 0, "median": 50, "90 %": 90, "99 %": 99, "longest": 100}
BEFORE_TARGETS, AFTER_TARGETS = "⟦", "⟧"


class DataKind(StrEnum):
    """What rows are meant to be."""

    TEXTS = "texts"
    PAIRS = "pairs"
    PROMPTS = "prompts"


@dataclass(frozen=True, slots=True)
class DataReport:
    """What a data set is.

    Attributes:
        kind: what its rows were meant to be.
        num_rows: rows read, bad ones included.
        num_kept: rows (pairs count once) that would be trained on.
        num_cut: of these, how many are cut at the right.
        left_out: good rows that would not be trained on, by reason.
        num_tokens: of the kept rows, as trained.
        num_targets: of these, how many are to be learnt.
        token_lengths: of all good texts before they are cut, by `LENGTH_POINTS`; empty without good rows.
        problems: the first `max_problems` of them.
        num_problems: all of them.
        examples: first rows as the model reads them, what is to be learnt in ⟦ ⟧.
    """

    kind: DataKind
    num_rows: int
    num_kept: int
    num_cut: int
    left_out: Mapping[str, int]
    num_tokens: int
    num_targets: int
    token_lengths: Mapping[str, int]
    problems: tuple[Problem, ...]
    num_problems: int
    examples: tuple[str, ...]

    @property
    def is_valid(self) -> bool:
        """Whether the data can be loaded."""
        return not self.num_problems and self.num_kept > 0

    @property
    def truncated_share(self) -> float:
        """Share of the kept rows that are cut."""
        return self.num_cut / self.num_kept if self.num_kept else 0.0

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [
            f"{self.num_rows} rows of {self.kind}: {self.num_kept} to be used, {self.num_problems} with problems",
            f"{self.num_tokens} tokens, {self.num_targets} of them to be learnt",
            f"{self.num_cut} rows are cut ({self.truncated_share:.1%})",
        ]
        lines += [f"{count} rows are left out: {reason}" for reason, count in self.left_out.items()]
        if self.token_lengths:
            points = ", ".join(f"{point} {length}" for point, length in self.token_lengths.items())
            lines.append(f"tokens of a text before cutting: {points}")
        lines += [str(problem) for problem in self.problems]
        if self.num_problems > len(self.problems):
            lines.append(f"... and {self.num_problems - len(self.problems)} further problems")
        return lines


def validate(
    table: DataTable,
    tokenizer: PreTrainedTokenizerBase,
    kind: DataKind | str,
    context: RunContext | None = None,
    *,
    end_ids: Iterable[int] | None = None,
    max_problems: int = MAX_PROBLEMS,
) -> DataReport:
    """Reads, renders and encodes everything, as loading would, and says what it found.

    Raises:
        InvalidRequest: the configuration itself cannot be used (a file is missing, no chat template, ...).
    """
    kind = DataKind(kind)
    items: Iterable[PreparedRow | PreparedPrompt | Problem]
    if kind is DataKind.PROMPTS:
        items = prepare_prompts(table, tokenizer)
    else:
        items = prepare_rows(table, tokenizer, pairs=kind is DataKind.PAIRS, end_ids=end_ids)
    survey = _Survey(tokenizer, max_problems)
    pace = Pace(context, STAGE, table.max_rows or 0)
    for item in items:
        pace.advance(metrics={"problems": float(survey.num_problems)})
        survey.take(item)
    return survey.report(kind)


class _Survey:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_problems: int) -> None:
        self._tokenizer = tokenizer
        self._max_problems = max_problems
        self._fates: Counter[Fate] = Counter()
        self._lengths = array("i")
        self._num_tokens = self._num_targets = 0
        self._problems: list[Problem] = []
        self._examples: list[str] = []
        self.num_problems = 0

    def take(self, item: PreparedRow | PreparedPrompt | Problem) -> None:
        if isinstance(item, Problem):
            self.num_problems += 1
            if len(self._problems) < self._max_problems:
                self._problems.append(item)
            return
        self._fates[item.fate] += 1
        texts = item.texts if isinstance(item, PreparedRow) else (_as_text(item),)
        self._lengths.extend(item.num_tokens if isinstance(item, PreparedRow) else [len(item.prompt_ids)])
        if not item.fate.is_kept:
            return
        for text in texts:
            self._num_tokens += len(text.ids)
            self._num_targets += text.num_targets
            if self._fates.total() <= MAX_EXAMPLES:
                self._examples.append(marked_text(text, self._tokenizer))

    def report(self, kind: DataKind) -> DataReport:
        lengths = {}
        if self._lengths:
            found = np.percentile(
                np.frombuffer(self._lengths, dtype=np.int32), list(LENGTH_POINTS.values()), method="higher"
            )
            lengths = {point: int(length) for point, length in zip(LENGTH_POINTS, found, strict=True)}
        return DataReport(
            kind=kind,
            num_rows=self._fates.total() + self.num_problems,
            num_kept=sum(count for fate, count in self._fates.items() if fate.is_kept),
            num_cut=self._fates[Fate.CUT],
            left_out={fate.value: count for fate, count in self._fates.items() if not fate.is_kept},
            num_tokens=self._num_tokens,
            num_targets=self._num_targets,
            token_lengths=lengths,
            problems=tuple(self._problems),
            num_problems=self.num_problems,
            examples=tuple(self._examples),
        )


def _as_text(item: PreparedPrompt) -> Encoded:
    return Encoded(item.prompt_ids, bytearray(len(item.prompt_ids)))


def marked_text(text: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text as the tokenizer reads it back, special tokens included, what is to be learnt in ⟦ ⟧."""
    pieces = []
    start = 0
    for end in range(1, len(text.ids) + 1):
        if end == len(text.ids) or text.marks[end] != text.marks[start]:
            piece = tokenizer.decode(text.ids[start:end], skip_special_tokens=False)
            pieces.append(f"{BEFORE_TARGETS}{piece}{AFTER_TARGETS}" if text.marks[start] else piece)
            start = end
    return "".join(pieces)
