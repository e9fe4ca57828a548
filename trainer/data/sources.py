"""Rows as they come from files or from a hub, one at a time: a dictionary with the place it was read from."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fusionroute.errors import InvalidRequest, Reason
from trainer.config import DataTable
from trainer.data.problems import Origin, Problem, shown

JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
PARQUET_SUFFIXES = (".parquet",)
PARQUET_BATCH_ROWS = 512


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row before anybody has looked at it."""

    origin: Origin
    content: Mapping[str, Any]


def read_rows(table: DataTable) -> Iterator[RawRow | Problem]:
    """The rows of all files, or of the hub data set, in order; what is no row comes as a Problem in its place.

    Raises:
        InvalidRequest: INVALID_FIELD, a file does not exist or is of no known kind; DATA_INVALID, the hub data
            set cannot be opened.
    """
    for path in table.files:
        _check_file(path)
    return islice(_all_rows(table), table.max_rows)


def _all_rows(table: DataTable) -> Iterator[RawRow | Problem]:
    if table.dataset:
        yield from _hub_rows(table)
    for path in table.files:
        yield from _parquet_rows(path) if path.name.endswith(PARQUET_SUFFIXES) else _json_rows(path)


def _check_file(path: Path) -> None:
    known = JSON_LINES_SUFFIXES + PARQUET_SUFFIXES
    if not path.name.endswith(known):
        raise InvalidRequest(
            Reason.INVALID_FIELD, f"files: {path} is not allowed: its name must end with {', '.join(known)}"
        )
    if not path.is_file():
        raise InvalidRequest(Reason.INVALID_FIELD, f"files: {path} is not a file")


def _json_rows(path: Path) -> Iterator[RawRow | Problem]:
    """Lines of JSON Lines; blank ones are passed over. A stream that breaks is one Problem at its last line."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_row(Origin(str(path), "line", number), line)
    except (OSError, EOFError, zlib.error) as error:
        yield Problem(Origin(str(path), "line", number + 1), "", f"the file cannot be read on: {error}")


def _json_row(origin: Origin, line: bytes) -> RawRow | Problem:
    try:
        content = json.loads(line.decode("utf-8-sig" if origin.number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Problem(origin, "", f"not UTF-8: byte {error.start} of the line is 0x{line[error.start]:02x}")
    except json.JSONDecodeError as error:
        return Problem(origin, "", f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Problem(origin, "", "not JSON that can be read: too deeply nested")
    if not isinstance(content, dict):
        return Problem(origin, "", f"{shown(content)} is not a JSON object")
    return RawRow(origin, content)


def _parquet_rows(path: Path) -> Iterator[RawRow | Problem]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for content in batch.to_pylist():
                    number += 1
                    yield RawRow(Origin(str(path), "row", number), content)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        yield Problem(Origin(str(path), "row", number + 1), "", f"the file cannot be read on: {error}")


def _hub_rows(table: DataTable) -> Iterator[RawRow | Problem]:
    source = "/".join(part for part in (table.dataset, table.subset) if part) + f" [{table.split}]"
    number = 0
    try:
        for number, content in enumerate(_open_hub(table), start=1):
            yield RawRow(Origin(source, "row", number), content)
    except InvalidRequest:
        raise
    except Exception as error:  # every loader on the hub fails in its own way
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        yield Problem(Origin(source, "row", number + 1), "", f"the data set cannot be read: {message}")


def _open_hub(table: DataTable) -> Iterator[Mapping[str, Any]]:
    """The rows of a hub data set, streamed: nothing is read beyond `max_rows`."""
    try:
        from datasets import load_dataset  # type: ignore[import-untyped]
    except ImportError:
        raise InvalidRequest(
            Reason.INVALID_FIELD,
            f"dataset = {table.dataset!r} needs the package `datasets`: pip install 'fusionroute[hub]'",
        ) from None
    rows = load_dataset(table.dataset, table.subset or None, split=table.split, streaming=True)
    yield from rows
