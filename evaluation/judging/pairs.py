"""What is judged: two answers to a prompt, read from two files of answers or from a file of pairs with a gold label."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusionroute.errors import InvalidRequest, Reason

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
    """

    pairs: tuple[AnswerPair, ...]
    num_only_first: int = 0
    num_only_second: int = 0


def read_answer_pairs(first: Path, second: Path) -> ReadPairs:
    """Pairs of answers with the same id, in the order of the first file.

    A row is JSON with `id`, `prompt` (text, or messages with `role` and `content`) and `answer`. Files whose names
    end in .gz are unpacked.

    Raises:
        InvalidRequest: a bad row, by file, line and field; an id twice; two prompts for one id; no id in common.
    """
    ours, theirs = _answers(first), _answers(second)
    pairs = []
    for key, (prompt, answer, line) in ours.items():
        if key not in theirs:
            continue
        other_prompt, other_answer, other_line = theirs[key]
        if prompt != other_prompt:
            raise _bad(
                second, other_line, "prompt", other_prompt, f"the prompt of {key!r} in {first}, line {line}"
            )
        pairs.append(AnswerPair(key, prompt, answer, other_answer))
    if not pairs:
        raise _bad(second, 1, "id", next(iter(theirs)), f"at least one id that {first} has too")
    return ReadPairs(tuple(pairs), len(ours) - len(pairs), len(theirs) - len(pairs))


def read_labelled_pairs(file: Path) -> ReadPairs:
    """Pairs of which it is known that one is better.

    A row is JSON with `prompt`, `chosen` (the better one) and `rejected`; `id` (else the line's number) and `source`
    (its group) may be there.

    Raises:
        InvalidRequest: a bad row, by file, line and field; an id twice; chosen equal to rejected; no rows.
    """
    pairs: dict[str, AnswerPair] = {}
    for line, row in _rows(file):
        key = _text(file, line, row, "id") if "id" in row else str(line)
        if key in pairs:
            raise _bad(file, line, "id", key, "an id that no row before has")
        chosen, rejected = (_text(file, line, row, name, allow_empty=True) for name in ("chosen", "rejected"))
        if chosen == rejected:
            raise _bad(file, line, "chosen", chosen, "another text than rejected")
        group = _text(file, line, row, "source") if "source" in row else ""
        pairs[key] = AnswerPair(key, _prompt(file, line, row), chosen, rejected, group)
    return ReadPairs(tuple(pairs.values()))


def _answers(file: Path) -> dict[str, tuple[str, str, int]]:
    """Prompt, answer and line by id."""
    found: dict[str, tuple[str, str, int]] = {}
    for line, row in _rows(file):
        key = _text(file, line, row, "id")
        if key in found:
            raise _bad(file, line, "id", key, f"an id that no row before has; line {found[key][2]} has it")
        found[key] = (_prompt(file, line, row), _text(file, line, row, "answer", allow_empty=True), line)
    return found


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Each row with the number of its line. Raises InvalidRequest: no file, no JSON object, no rows."""
    line, num_rows = 0, 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            for line, text in enumerate(lines, 1):
                if text.strip():
                    row = json.loads(text)
                    if not isinstance(row, dict):
                        raise _bad(file, line, "row", row, "a JSON object")
                    num_rows += 1
                    yield line, row
    except (OSError, EOFError, zlib.error) as error:
        raise _bad(
            file, line + 1, "file", type(error).__name__, f"a file that can be read: {error}"
        ) from None
    except ValueError as error:
        raise _bad(file, line, "row", text, f"JSON in UTF-8: {error}") from None
    if not num_rows:
        raise _bad(file, max(line, 1), "row", "", "at least one row")


def _text(file: Path, line: int, row: Mapping[str, Any], name: str, *, allow_empty: bool = False) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not (value.strip() or allow_empty):
        raise _bad(file, line, name, value, "text" if allow_empty else "text that is not empty")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise _bad(file, line, name, f"{len(value)} characters", f"at most {MAX_TEXT_CHARACTERS}")
    return value


def _prompt(file: Path, line: int, row: Mapping[str, Any]) -> str:
    """A text as it is; messages with their roles before them."""
    messages = row.get("prompt")
    if not isinstance(messages, list):
        return _text(file, line, row, "prompt")
    told = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise _bad(file, line, f"prompt[{number}]", message, "an object with role and content, both text")
        told.append(f"{message['role']}: {message['content']}")
    if not told:
        raise _bad(file, line, "prompt", messages, "text, or at least one message")
    return "\n\n".join(told)


def _bad(file: Path, line: int, field: str, value: object, limit: str) -> InvalidRequest:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return InvalidRequest(
        Reason.DATA_INVALID,
        f"{file}, line {line}: {field} = {shown} is not allowed: {limit}",
        metadata={"file": str(file), "line": str(line), "field": field, "limit": limit},
    )
