"""Held-out texts as token ids, to be judged: how probable a system finds each token, whether it is its first choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.judged import JudgedText
from evaluation.questions import Answer, Outcome, Question, Verdict
from evaluation.tasks.json_lines import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Text:
    """A text of which the tokens after the prompt are judged.

    Attributes:
        question: with the text's id, task and cluster, for statistics.
        prompt_ids: read, not judged; at least one token.
        ids: judged.
    """

    question: Question
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]


def load_texts(
    path: Path, name: str, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, max_rows: int | None = None
) -> list[Text]:
    """Rows with `text`, or with `prompt` and `completion`, whose end is judged too.

    Args:
        name: of the task they belong to.
        max_tokens: of a row; what is longer is cut at the right.
        max_rows: no more than the first so many.

    Raises:
        InvalidRequest: naming file, line, field, value and limit.
    """
    return list(_texts(path, name, tokenizer, max_tokens, max_rows))


def _texts(
    path: Path, name: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int, max_rows: int | None
) -> Iterator[Text]:
    for number, row in enumerate(read_rows(path)):
        if max_rows is not None and number >= max_rows:
            return
        id_ = f"{name}/{row.line}"
        if "completion" in row.content:
            prompt = _ids(tokenizer, row.text("prompt"), special=True)
            ids = [*_ids(tokenizer, row.text("completion"), special=False), tokenizer.eos_token_id]
        else:
            first, *ids = _ids(tokenizer, row.text("text"), special=True)
            prompt = [first]
        ids = ids[: max(0, max_tokens - len(prompt))]
        if prompt and len(ids) >= LEAST_TOKENS:
            question = Question(id_, name, "", facts={"ids": [*prompt, *ids]}, cluster=id_)
            yield Text(question, tuple(prompt), tuple(ids))


def outcome_of(text: Text, judged: JudgedText, way: str, seed: int = 0) -> Outcome:
    """A system's view of a text: the sum of log-probabilities; as score the share of tokens that it would write."""
    opinion = judged.opinions[way]
    rights = judged.rights(way)
    answer = Answer("", True, len(rights), sum(opinion.logprobs), opinion.experts)
    return Outcome(text.question, way, seed, answer, Verdict(sum(rights) / len(rights)))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])
