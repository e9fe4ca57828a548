"""What is judged: two answers to a prompt, read from two files of answers or from a file of pairs with a gold label."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from evaluation.tasks.json_lines import Row, read_rows
from fusionroute.errors import invalid

MAX_TEXT_CHARACTERS = 200_000


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """Two answers to the same prompt.

    Attributes:
        id: unique within a run.
        prompt: as a judge shall read it.
        first, second: the answers of the first and of the second system; of labelled pairs the better one is first.
        group: a subset that is reported apart; "" = none.
    """

    id: str
    prompt: str
    first: str
    second: str
    group: str = ""

    @property
    def is_same(self) -> bool:
        """Whether there is nothing to choose: a tie that no judge is asked about."""
        return self.first == self.second


def digest_of(pairs: Iterable[AnswerPair]) -> str:
    """16 hexadecimal digits that tell one list of pairs from another."""
    hasher = hashlib.sha256()
    for pair in pairs:
        hasher.update(json.dumps(asdict(pair), sort_keys=True, ensure_ascii=False).encode())
    return hasher.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ReadPairs:
    """What two files of answers have in common.

    Attributes:
        num_only_first, num_only_second: answers that the other file has none for; nobody can judge them.
        num_unlabelled: labelled pairs that are left out because both answers are the same.
    """

    pairs: tuple[AnswerPair, ...]
    num_only_first: int = 0
    num_only_second: int = 0
    num_unlabelled: int = 0

    @property
    def num_left_out(self) -> int:
        """What cannot be judged."""
        return self.num_only_first + self.num_only_second + self.num_unlabelled


def read_answer_pairs(first: Path, second: Path) -> ReadPairs:
    """Pairs of answers with the same id, in the order of the first file.

    A row is JSON with `id`, `prompt` (text, or messages with `role` and `content`) and `answer`.

    Raises:
        InvalidRequest: a bad row, by file, line and field; an id twice; two prompts for one id; no id in common.
    """
    ours, theirs = _by_id(first), _by_id(second)
    pairs = []
    for key, row in ours.items():
        other = theirs.get(key)
        if other is None:
            continue
        prompt, other_prompt = _prompt(row), _prompt(other)
        if prompt != other_prompt:
            limit = f"the prompt of {key!r} in {first}, line {row.line}"
            raise other.fault(invalid("prompt", other_prompt, limit))
        pairs.append(AnswerPair(key, prompt, _answer(row, "answer"), _answer(other, "answer")))
    if not pairs:
        raise invalid("second", str(second), f"at least one id that {first} has too")
    return ReadPairs(tuple(pairs), len(ours) - len(pairs), len(theirs) - len(pairs))


def read_labelled_pairs(file: Path) -> ReadPairs:
    """Pairs of which it is known that one is better.

    A row is JSON with `prompt`, `chosen` (the better one) and `rejected`; `id` (else the line's number) and `source`
    (its group) may be there.

    Raises:
        InvalidRequest: a bad row, by file, line and field; an id twice; no rows.
    """
    pairs: dict[str, AnswerPair] = {}
    for row in _rows(file):
        key = row.text("id") if "id" in row.content else str(row.line)
        if key in pairs:
            raise row.fault(invalid("id", key, "an id that no row before has"))
        chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
        group = row.text("source") if "source" in row.content else ""
        pairs[key] = AnswerPair(key, _prompt(row), chosen, rejected, group)
    unlike = tuple(pair for pair in pairs.values() if not pair.is_same)
    if not unlike:
        raise invalid("path", str(file), "a file with at least one pair of two different answers")
    return ReadPairs(unlike, num_unlabelled=len(pairs) - len(unlike))


def _by_id(file: Path) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for row in _rows(file):
        key = row.text("id")
        if key in found:
            raise row.fault(
                invalid("id", key, f"an id that no row before has; line {found[key].line} has it")
            )
        _prompt(row), _answer(row, "answer")  # a row that is wrong is wrong without a counterpart too
        found[key] = row
    return found


def _rows(file: Path) -> Iterator[Row]:
    """At least one."""
    is_empty = True
    for row in read_rows(file):
        is_empty = False
        yield row
    if is_empty:
        raise invalid("path", str(file), "a file with at least one row")


def _answer(row: Row, field: str) -> str:
    """Which may be empty."""
    value = row.content.get(field)
    if not isinstance(value, str):
        raise row.fault(invalid(field, value, "a text"))
    return _bounded(row, field, value)


def _prompt(row: Row) -> str:
    """A text as it is; messages with their roles before them."""
    messages = row.content.get("prompt")
    if not isinstance(messages, list):
        return _bounded(row, "prompt", row.text("prompt"))
    told = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(each), str) for each in ("role", "content")
        ):
            raise row.fault(
                invalid(f"prompt[{number}]", message, "an object with role and content, both text")
            )
        told.append(f"{message['role']}: {message['content']}")
    if not told:
        raise row.fault(invalid("prompt", messages, "a text, or at least one message"))
    return _bounded(row, "prompt", "\n\n".join(told))


def _bounded(row: Row, field: str, text: str) -> str:
    if len(text) > MAX_TEXT_CHARACTERS:
        raise row.fault(invalid(field, f"{len(text)} characters", f"at most {MAX_TEXT_CHARACTERS}"))
    return text
