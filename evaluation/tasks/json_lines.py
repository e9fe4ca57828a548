"""Files of questions, one JSON object on each line, plain or gzipped; what is wrong in them is said with its line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusionroute.errors import InvalidRequest, Reason, invalid

SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True, slots=True)
class Row:
    """One line.

    Attributes:
        path: of the file.
        line: counted from 1.
        content: its object.
    """

    path: Path
    line: int
    content: Mapping[str, Any]

    def text(self, field: str) -> str:
        """The text of a field.

        Raises:
            InvalidRequest: DATA_INVALID, it is missing, blank or no text.
        """
        value = self.content.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.fault(invalid(field, value, "a text that is not empty"))
        return value

    def fault(self, error: InvalidRequest) -> InvalidRequest:
        """The error with file and line before it, as DATA_INVALID."""
        return _fault(self.path, self.line, error.message)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in order; blank lines are passed over.

    Raises:
        InvalidRequest: INVALID_FIELD, there is no such file or its name ends otherwise; DATA_INVALID naming file
            and line: a line that is no JSON object, or a file that breaks off.
    """
    if not path.name.endswith(SUFFIXES):
        raise invalid("path", str(path), f"its name must end with {' or '.join(SUFFIXES)}")
    if not path.is_file():
        raise invalid("path", str(path), "a file that exists")
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Row(path, number, _object(path, number, line))
    except (OSError, EOFError, zlib.error) as error:
        raise _fault(path, number + 1, f"the file cannot be read on: {error}") from None


def _object(path: Path, number: int, line: bytes) -> Mapping[str, Any]:
    try:
        content = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        message = f"not UTF-8: byte {error.start} of the line is 0x{line[error.start]:02x}"
        raise _fault(path, number, message) from None
    except ValueError as error:
        raise _fault(path, number, f"not JSON: {error}") from None
    except RecursionError:
        raise _fault(path, number, "not JSON that can be read: too deeply nested") from None
    if not isinstance(content, dict):
        raise _fault(path, number, f"{str(content)[:60]!r} is not a JSON object")
    return content


def _fault(path: Path, line: int, message: str) -> InvalidRequest:
    return InvalidRequest(
        Reason.DATA_INVALID,
        f"{path}: line {line}: {message}",
        metadata={"source": str(path), "row": str(line)},
    )
