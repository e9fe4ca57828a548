"""The way of a row: read, understood, rendered, encoded, made to fit. Shared by loading and validating."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.config import DataTable
from trainer.data.encoding import Encoded, Encoder
from trainer.data.formats import Question, read_pair, read_question, read_text
from trainer.data.problems import Origin, Problem, RowFault
from trainer.data.rendering import Renderer, Script
from trainer.data.sources import RawRow, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 256

Item = TypeVar("Item")


class Fate(Enum):
    """What becomes of a good row."""

    WHOLE = "whole"
    CUT = "cut"
    TOO_LONG = "too long"
    PROMPT_TOO_LONG = "prompt too long"
    EQUAL_ONCE_CUT = "chosen and rejected equal once cut"

    @property
    def is_kept(self) -> bool:
        """Whether the row is trained on."""
        return self in (Fate.WHOLE, Fate.CUT)


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """A good row.

    Attributes:
        texts: one, or chosen and rejected of a pair; cut where `fate` says so.
        num_tokens: of each text before it was cut.
        fate: what becomes of it.
    """

    origin: Origin
    texts: tuple[Encoded, ...]
    num_tokens: tuple[int, ...]
    fate: Fate


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A good prompt with its gold answer."""

    origin: Origin
    question: Question
    prompt_ids: list[int]
    fate: Fate


def prepare_rows(
    table: DataTable,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pairs: bool,
    end_ids: Iterable[int] | None = None,
) -> Iterator[PreparedRow | Problem]:
    """Every row of the data, good or bad; within a batch of `BATCH_ROWS` bad ones that need no tokens come first.

    Raises:
        InvalidRequest: the configuration itself cannot be used.
    """
    renderer = Renderer.of(table, tokenizer)
    encoder = Encoder(tokenizer, end_of_text=table.end_of_text, end_ids=end_ids)

    def render(content: Mapping[str, Any]) -> tuple[Script, ...]:
        if pairs:
            return renderer.render_pair(read_pair(content))
        return (renderer.render(read_text(content)),)

    for batch in _batches(_understood(table, render)):
        good = [item for item in batch if not isinstance(item, Problem)]
        yield from (item for item in batch if isinstance(item, Problem))
        encoded = iter(encoder.encode([script for _, scripts in good for script in scripts]))
        for origin, scripts in good:
            texts = tuple(islice(encoded, len(scripts)))
            try:
                yield _fitted(origin, texts, table)
            except RowFault as fault:
                yield Problem.of(origin, fault)


def prepare_prompts(
    table: DataTable, tokenizer: PreTrainedTokenizerBase
) -> Iterator[PreparedPrompt | Problem]:
    """Every prompt of the data, good or bad. Raises as `prepare_rows`."""
    renderer = Renderer.of(table, tokenizer)
    encoder = Encoder(tokenizer, end_of_text=False)
    for item in _understood(table, read_question):
        if isinstance(item, Problem):
            yield item
            continue
        origin, question = item
        try:
            yield _prompt(origin, question, renderer, encoder, table)
        except RowFault as fault:
            yield Problem.of(origin, fault)


def _prompt(
    origin: Origin, question: Question, renderer: Renderer, encoder: Encoder, table: DataTable
) -> PreparedPrompt:
    if isinstance(question.prompt, str):
        ids = encoder.prompt_ids(question.prompt, has_template=False)
    else:
        ids = encoder.prompt_ids(renderer.prompt_text(question.prompt), has_template=True)
    fate = Fate.WHOLE
    if len(ids) >= table.max_tokens:
        fate = Fate.PROMPT_TOO_LONG
        if table.overlong == "refuse":
            raise RowFault("prompt", f"{len(ids)} tokens leave no room in max_tokens = {table.max_tokens}")
    return PreparedPrompt(origin, question, ids, fate)


def _understood(
    table: DataTable, understand: Callable[[Mapping[str, Any]], Item]
) -> Iterator[tuple[Origin, Item] | Problem]:
    for row in read_rows(table):
        if isinstance(row, RawRow):
            try:
                yield row.origin, understand(row.content)
            except RowFault as fault:
                yield Problem.of(row.origin, fault)
        else:
            yield row


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    while batch := list(islice(items, BATCH_ROWS)):
        yield batch


def _fitted(origin: Origin, texts: tuple[Encoded, ...], table: DataTable) -> PreparedRow:
    """The row within `max_tokens`. Raises RowFault where it cannot be trained on."""
    num_tokens = tuple(len(text.ids) for text in texts)
    for text in texts:
        if not text.num_targets:
            raise RowFault(
                "", f"no token to learn: the text has {len(text.ids)}, and nothing predicts the first"
            )
    is_pair = len(texts) == 2
    if is_pair and texts[0].ids == texts[1].ids:
        raise RowFault("rejected", "the same tokens as `chosen`: nothing can be preferred")
    if max(num_tokens) <= table.max_tokens:
        return PreparedRow(origin, texts, num_tokens, Fate.WHOLE)
    if table.overlong == "refuse":
        raise RowFault("", f"{max(num_tokens)} tokens; max_tokens = {table.max_tokens}")
    if table.overlong == "drop":
        return PreparedRow(origin, texts, num_tokens, Fate.TOO_LONG)
    cut = tuple(text.cut(table.max_tokens) for text in texts)
    fate = Fate.CUT
    if not all(text.num_targets for text in cut):
        fate = Fate.PROMPT_TOO_LONG
    elif is_pair and cut[0].ids == cut[1].ids:
        fate = Fate.EQUAL_ONCE_CUT
    return PreparedRow(origin, cut, num_tokens, fate)
