"""Every judgement on disk as soon as it is made: JSON lines that an interrupted run goes on from.

The first line says what was asked of whom; a run that would ask something else is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from evaluation.judging.judgements import Ask, Judgement, Order
from evaluation.judging.prompting import Choice
from fusionroute.errors import InvalidRequest, Reason, invalid

FORMAT = 1


class JudgingJournal:
    """Judgements of one run, in the order in which they were made."""

    def __init__(self, file: IO[bytes], judgements: list[Judgement]) -> None:
        self.judgements = judgements
        self._file = file

    @classmethod
    @contextmanager
    def open(cls, path: Path, facts: Mapping[str, Any]) -> Iterator[JudgingJournal]:
        """The journal of a run, new or as it was left; its last line may be torn and is then dropped.

        Args:
            path: the file, made where it is missing, with its folder.
            facts: all that decides what a judge says, as JSON has it.

        Raises:
            InvalidRequest: it is another run's, another process writes it, or a line in its middle is broken.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise invalid("output", str(path), "a journal that no other process writes") from None
            file.seek(0)
            lines = file.read().split(b"\n")
            file.truncate(sum(len(line) + 1 for line in lines[:-1]))
            if len(lines) == 1:
                _write(file, {"format": FORMAT, "facts": dict(facts)})
                judgements = []
            else:
                _check(path, _parsed(path, 1, lines[0]), facts)
                judgements = [_judgement(path, number, line) for number, line in enumerate(lines[1:-1], 2)]
            try:
                yield cls(file, judgements)
            finally:
                os.fsync(file.fileno())

    def add(self, judgement: Judgement) -> None:
        """Writes it down at once."""
        _write(self._file, asdict(judgement))
        self.judgements.append(judgement)


def _write(file: IO[bytes], row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    file.flush()


def _check(path: Path, header: Any, facts: Mapping[str, Any]) -> None:
    if (
        not isinstance(header, dict)
        or header.get("format") != FORMAT
        or not isinstance(header.get("facts"), dict)
    ):
        raise _broken(path, 1, f"a journal of format {FORMAT}")
    begun_with = header["facts"]
    for name, value in json.loads(json.dumps(facts)).items():
        if begun_with.get(name) != value:
            raise invalid(
                name, value, f"{begun_with.get(name)!r}, which {path} was begun with; or another output"
            )


def _parsed(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise _broken(path, number, "JSON") from None


def _judgement(path: Path, number: int, line: bytes) -> Judgement:
    row = _parsed(path, number, line)
    try:
        ask = Ask(row["ask"]["pair"], Order(row["ask"]["order"]), row["ask"]["repeat"])
        choice = None if row["choice"] is None else Choice(row["choice"])
        return Judgement(**{**row, "ask": ask, "choice": choice})
    except (KeyError, TypeError, ValueError):
        raise _broken(path, number, "a judgement") from None


def _broken(path: Path, number: int, what: str) -> InvalidRequest:
    return InvalidRequest(Reason.DATA_INVALID, f"{path}, line {number} is not {what}; take another output")
