"""What is wrong with a row, said so that a person finds the row and can mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fusionroute.errors import InvalidRequest, Reason

SHOWN_CHARACTERS = 60


class Origin(NamedTuple):
    """Where a row stands: a file and its line, or a table and its row, counted from 1."""

    source: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}: {self.unit} {self.number}" if self.number else self.source


class RowFault(Exception):
    """A row cannot be used.

    Attributes:
        field: of the row, for example ``messages[2].role``; empty = the row as a whole.
        explanation: what is wrong with it.
    """

    def __init__(self, field: str, explanation: str) -> None:
        super().__init__(f"{field}: {explanation}" if field else explanation)
        self.field = field
        self.explanation = explanation


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault with the place where it was found."""

    origin: Origin
    field: str
    explanation: str

    @classmethod
    def of(cls, origin: Origin, fault: RowFault) -> Problem:
        """The fault of the row at `origin`."""
        return cls(origin, fault.field, fault.explanation)

    def __str__(self) -> str:
        where = f"{self.origin}: {self.field}" if self.field else str(self.origin)
        return f"{where}: {self.explanation}"

    def to_error(self) -> InvalidRequest:
        """The problem as DATA_INVALID, naming file, line and field."""
        metadata = {"source": self.origin.source, "row": str(self.origin.number)}
        if self.field:
            metadata["field"] = self.field
        return InvalidRequest(Reason.DATA_INVALID, str(self), metadata=metadata)


def shown(value: object) -> str:
    """A value as messages show it: one line, not long."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
