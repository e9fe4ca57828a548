"""Arguments of instructions: what each may be, and errors that name instruction, argument, value and limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Protocol, get_type_hints

from fusionroute.errors import invalid

MAX_COUNT = 1_000_000


class Relation(StrEnum):
    """How a count compares with its limit. The data set knows these two."""

    LESS_THAN = "less than"
    AT_LEAST = "at least"

    def holds(self, count: int, limit: int) -> bool:
        """Whether `count` stands in this relation to `limit`."""
        return count < limit if self is Relation.LESS_THAN else count >= limit


class Kind(Protocol):
    """What an argument may be."""

    limit: str

    def read(self, value: Any) -> Any:
        """The value as the instruction keeps it.

        Raises:
            ValueError: it is not what `limit` says.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Count:
    limit: str = f"a whole number between 1 and {MAX_COUNT}"

    def read(self, value: Any) -> int:
        # Data sets that went through tables with empty places have their counts as 3.0.
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise ValueError(value)
        if not 1 <= value <= MAX_COUNT:
            raise ValueError(value)
        return int(value)


@dataclass(frozen=True, slots=True)
class _Text:
    limit: str = "a text that is not empty"

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(value)
        return value.strip()


@dataclass(frozen=True, slots=True)
class _Word:
    limit: str = "one word, without white space"

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or len(value.split()) != 1:
            raise ValueError(value)
        return value.strip()


@dataclass(frozen=True, slots=True)
class _Character:
    limit: str = "one character that is not white space"

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or len(value.strip()) != 1:
            raise ValueError(value)
        return value.strip()


@dataclass(frozen=True, slots=True)
class _Texts:
    limit: str = "a list of at least one text, none of them empty"

    def read(self, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(value)
        return tuple(_Text().read(item) for item in value)


@dataclass(frozen=True, slots=True)
class _Comparison:
    limit: str = " or ".join(f'"{relation}"' for relation in Relation)

    def read(self, value: Any) -> Relation:
        return Relation(value)


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of these texts."""

    choices: tuple[str, ...]

    @property
    def limit(self) -> str:
        """What is allowed, for people."""
        return f"one of {', '.join(self.choices)}"

    def read(self, value: Any) -> str:
        """The value itself.

        Raises:
            ValueError: it is none of the choices.
        """
        if not isinstance(value, str) or value not in self.choices:
            raise ValueError(value)
        return value


Count = Annotated[int, _Count()]
Text = Annotated[str, _Text()]
Word = Annotated[str, _Word()]
Character = Annotated[str, _Character()]
Texts = Annotated[tuple[str, ...], _Texts()]
Comparison = Annotated[Relation, _Comparison()]


class Instruction(Protocol):
    """One checkable instruction with its arguments."""

    name: ClassVar[str]

    def is_followed(self, text: str) -> bool:
        """Whether the answer `text`, which holds more than white space, does what the instruction asks for."""
        ...


def build(kind: type[Instruction], arguments: Mapping[str, Any], place: str) -> Instruction:
    """An instruction of this kind; arguments that are None count as absent.

    Args:
        place: where the arguments stand, for messages: ``instructions[0]``.

    Raises:
        InvalidRequest: INVALID_FIELD naming place, instruction, argument, value and limit.
    """
    where = f"{place} {kind.name}"
    given = {name: value for name, value in arguments.items() if value is not None}
    hints = get_type_hints(kind, include_extras=True)
    expected = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # kinds are dataclasses
    for name, value in given.items():
        if name not in expected:
            raise invalid(f"{where}: {name}", value, f"its arguments are {', '.join(expected) or 'none'}")
    values = {}
    for name in expected:
        check: Kind = hints[name].__metadata__[0]
        try:
            values[name] = check.read(given.get(name))
        except ValueError:
            raise invalid(f"{where}: {name}", given.get(name), check.limit) from None
    try:
        return kind(**values)
    except ArgumentsClash as clash:
        raise invalid(f"{where}: {clash.argument}", values[clash.argument], clash.limit) from None


class ArgumentsClash(ValueError):
    """Arguments that do not go together.

    Attributes:
        argument: the one that goes beyond what another allows.
        limit: what is allowed.
    """

    def __init__(self, argument: str, limit: str) -> None:
        super().__init__(f"{argument}: {limit}")
        self.argument = argument
        self.limit = limit
