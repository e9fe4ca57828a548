"""What an evaluation has heard so far, on disk: one file of JSON lines for each thing asked, taken up again later.

    <folder>/<name>.jsonl   {"what": ..., "digest": ...}        whose answers these are
                            {"id": "box_m/held-out/1", ...}     one line for each question

A line is written when its answer is there, so that a killed run loses what was in flight and nothing else; a torn last
line is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fusionroute.errors import InvalidRequest, Reason

FLUSH_EVERY_LINES = 64


class Journal:
    """Lines by id.

    Attributes:
        entries: what is known, by id; the line without its id.
    """

    def __init__(self, path: Path, entries: dict[str, dict[str, Any]], file: TextIO) -> None:
        self.path, self.entries = path, entries
        self._file = file
        self._unflushed = 0

    @classmethod
    @contextmanager
    def open(cls, path: Path, what: Mapping[str, Any]) -> Iterator[Journal]:
        """The journal at `path`, begun if it is not there.

        Args:
            what: decides the answers: who is asked and what; plain values.

        Raises:
            InvalidRequest: the file belongs to something else.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = _read(path, what) if path.exists() else None
        if entries is None:
            _begin(path, what)
            entries = {}
        with path.open("a", encoding="utf-8") as file:
            journal = cls(path, entries, file)
            try:
                yield journal
            finally:
                file.flush()
                os.fsync(file.fileno())

    @staticmethod
    def read(path: Path) -> dict[str, dict[str, Any]]:
        """The entries of a journal by id. Raises FileNotFoundError."""
        whole, _ = _lines(path)
        return _by_id(whole[1:])

    def add(self, id_: str, entry: dict[str, Any]) -> None:
        """Remembers an entry. Raises OSError: the disk is full."""
        self._file.write(json.dumps({"id": id_, **entry}, ensure_ascii=False) + "\n")
        self.entries[id_] = entry
        self._unflushed += 1
        if self._unflushed >= FLUSH_EVERY_LINES:
            self._file.flush()
            self._unflushed = 0


def _begin(path: Path, what: Mapping[str, Any]) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(what, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    draft.rename(path)


def _read(path: Path, what: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """The entries, the torn rest cut off; None where not even the first line is whole."""
    lines, num_torn_bytes = _lines(path)
    if not lines:
        return None
    found = json.loads(lines[0])
    if found != json.loads(json.dumps(what)):
        differing = sorted(key for key in {*found, *what} if found.get(key) != what.get(key))
        raise InvalidRequest(
            Reason.INVALID_FIELD,
            f"{path} holds answers to something else: {', '.join(differing)} differ; choose another folder",
            metadata={"field": "output"},
        )
    if num_torn_bytes:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - num_torn_bytes)
    return _by_id(lines[1:])


def _lines(path: Path) -> tuple[list[str], int]:
    """The whole lines, and how many bytes of a torn one follow."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    return whole.decode("utf-8").split("\n")[:-1], len(content) - len(whole)


def _by_id(lines: list[str]) -> dict[str, dict[str, Any]]:
    entries = {}
    for line in lines:
        entry = json.loads(line)
        entries[entry.pop("id")] = entry
    return entries
