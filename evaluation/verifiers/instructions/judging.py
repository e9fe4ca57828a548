"""Which instructions an answer follows, strictly and loosely."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from evaluation.questions import Answer, Question, Verdict
from evaluation.verifiers.instructions.arguments import Instruction
from evaluation.verifiers.instructions.registry import instruction
from fusionroute.errors import invalid


class Strictness(Enum):
    """Strict: the answer as it is. Loose: it or one of its variants, see `variants`."""

    STRICT = "strict"
    LOOSE = "loose"


def verify(question: Question, answer: Answer) -> Verdict:
    """Right if the answer follows all instructions of the question, strictly.

    `question.facts["instructions"]` is a list of ``{"name": "keywords:existence", "arguments": {...}}``. The verdict's
    `parts` say of each instruction whether it is followed; its note names the first that is not.

    Raises:
        InvalidRequest: INVALID_FIELD naming instruction, argument, value and limit; or langdetect is not installed.
    """
    return _verdict(question, answer, Strictness.STRICT)


def verify_loosely(question: Question, answer: Answer) -> Verdict:
    """Like `verify`, but an instruction is followed if one of the answer's variants follows it."""
    return _verdict(question, answer, Strictness.LOOSE)


def followed(instructions: Sequence[Instruction], text: str, strictness: Strictness) -> list[bool]:
    """Of each instruction, whether `text` follows it. A blank text follows none."""
    texts = [text] if strictness is Strictness.STRICT else list(variants(text))
    return [any(one.strip() and given.is_followed(one) for one in texts) for given in instructions]


def variants(text: str) -> Iterator[str]:
    """The answer; without its first line, its last line, both; and each of these without asterisks.

    So "Sure, here it is:" before an answer and markdown emphasis in it do no harm.
    """
    lines = text.split("\n")
    for kept in (lines, lines[1:], lines[:-1], lines[1:-1]):
        part = text if kept is lines else "\n".join(kept).strip()
        yield part
        yield part.replace("*", "")


def instructions_of(question: Question) -> list[Instruction]:
    """The instructions of a question.

    Raises:
        InvalidRequest: INVALID_FIELD naming instruction, argument, value and limit.
    """
    listed = question.facts.get("instructions")
    if not isinstance(listed, list | tuple) or not listed:
        raise invalid("instructions", listed, "a list of at least one instruction")
    return [_read(item, f"instructions[{index}]") for index, item in enumerate(listed)]


def part_names(instructions: Sequence[Instruction]) -> list[str]:
    """Their names; the second of the same name is ``NAME #2``."""
    names: list[str] = []
    seen: dict[str, int] = {}
    for given in instructions:
        seen[given.name] = seen.get(given.name, 0) + 1
        names.append(given.name if seen[given.name] == 1 else f"{given.name} #{seen[given.name]}")
    return names


def _read(item: Any, place: str) -> Instruction:
    if not isinstance(item, Mapping):
        raise invalid(place, item, 'an object {"name": ..., "arguments": {...}}')
    arguments = item.get("arguments", {})
    if not isinstance(arguments, Mapping):
        raise invalid(f"{place} arguments", arguments, "an object")
    return instruction(item.get("name"), arguments, place)


def _verdict(question: Question, answer: Answer, strictness: Strictness) -> Verdict:
    instructions = instructions_of(question)
    results = followed(instructions, answer.text, strictness)
    parts = dict(zip(part_names(instructions), results, strict=True))
    missed = next((name for name, is_followed in parts.items() if not is_followed), "")
    if missed and not answer.text.strip():
        return Verdict(0.0, f"empty answer: {missed} is not followed", parts)
    return Verdict(0.0, f"{missed} is not followed", parts) if missed else Verdict(1.0, parts=parts)
