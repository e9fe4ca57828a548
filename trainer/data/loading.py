"""Data sets as rows of tokens: `load_texts`, `load_pairs`, `load_prompts`. The first bad row ends the loading."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import structlog

from fusionroute.errors import InvalidRequest, Reason
from trainer.config import DataTable
from trainer.data.encoding import Encoded
from trainer.data.formats import Message
from trainer.data.preparing import Fate, PreparedPrompt, PreparedRow, prepare_prompts, prepare_rows
from trainer.data.problems import Problem
from trainer.pace import Pace
from trainer.rows import PairSet, RowSet
from trainer.run_context import RunContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGE = "data"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class GoldPrompt:
    """A prompt to be answered, and the right answer.

    Attributes:
        prompt: text, or messages with ``role`` and ``content``.
        prompt_ids: its tokens as the router service would encode it.
        gold: the right answer.
        origin: file and line, for people.
    """

    prompt: str | tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    gold: str
    origin: str


def load_texts(
    table: DataTable,
    tokenizer: PreTrainedTokenizerBase,
    context: RunContext | None = None,
    *,
    end_ids: Iterable[int] | None = None,
) -> RowSet:
    """The texts of a data set as rows.

    Args:
        table: which data, and what becomes of long rows.
        tokenizer: of the models.
        context: is told how far it is, and may stop it.
        end_ids: tokens that end an answer; None = EOS and those of the generation settings that lie where the
            tokenizer was loaded from.

    Raises:
        InvalidRequest: DATA_INVALID naming file, line, field and what is wrong; INVALID_FIELD naming a file or
            setting that cannot be used.
        Stopped: `context` was asked to stop.
    """
    return _collect(table, prepare_rows(table, tokenizer, pairs=False, end_ids=end_ids), context)


def load_pairs(
    table: DataTable,
    tokenizer: PreTrainedTokenizerBase,
    context: RunContext | None = None,
    *,
    end_ids: Iterable[int] | None = None,
) -> PairSet:
    """The preference pairs of a data set; both rows of a pair begin with the same prompt. As `load_texts`."""
    return PairSet(_collect(table, prepare_rows(table, tokenizer, pairs=True, end_ids=end_ids), context))


def load_prompts(
    table: DataTable, tokenizer: PreTrainedTokenizerBase, context: RunContext | None = None
) -> list[GoldPrompt]:
    """The prompts of a data set with their gold answers. As `load_texts`."""
    prompts = []
    fates: Counter[Fate] = Counter()
    pace = Pace(context, STAGE, table.max_rows or 0)
    for item in prepare_prompts(table, tokenizer):
        if isinstance(item, Problem):
            raise item.to_error()
        pace.advance()
        fates[item.fate] += 1
        if item.fate.is_kept:
            prompts.append(_gold_prompt(item))
    _check_and_tell(table, fates)
    return prompts


def _gold_prompt(item: PreparedPrompt) -> GoldPrompt:
    return GoldPrompt(item.question.prompt, tuple(item.prompt_ids), item.question.gold, str(item.origin))


def _collect(table: DataTable, items: Iterable[PreparedRow | Problem], context: RunContext | None) -> RowSet:
    buffer = _Buffer()
    fates: Counter[Fate] = Counter()
    pace = Pace(context, STAGE, table.max_rows or 0)
    for item in items:
        if isinstance(item, Problem):
            raise item.to_error()
        pace.advance()
        fates[item.fate] += 1
        if item.fate.is_kept:
            for text in item.texts:
                buffer.add(text)
    _check_and_tell(table, fates)
    return buffer.to_rows()


def _check_and_tell(table: DataTable, fates: Counter[Fate]) -> None:
    source = table.dataset or ", ".join(str(path) for path in table.files)
    left_out = {fate.value: count for fate, count in fates.items() if not fate.is_kept}
    num_kept = sum(count for fate, count in fates.items() if fate.is_kept)
    if not num_kept:
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "there are none"
        raise InvalidRequest(Reason.DATA_INVALID, f"{source}: no row is left to train on: {why}")
    log.info("data_loaded", source=source, rows=num_kept, cut=fates[Fate.CUT], left_out=left_out)


class _Buffer:
    """Rows end to end, in four bytes and one byte a token."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._marks = bytearray()
        self._starts = array("q", [0])

    def add(self, text: Encoded) -> None:
        self._ids.extend(text.ids)
        self._marks += text.marks
        self._starts.append(len(self._ids))

    def to_rows(self) -> RowSet:
        """Without copying; the buffer must not be used any more."""
        return RowSet(
            np.frombuffer(self._ids, dtype=np.int32),
            np.frombuffer(self._marks, dtype=np.bool_),
            np.frombuffer(self._starts, dtype=np.int64),
        )
