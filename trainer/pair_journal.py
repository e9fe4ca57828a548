"""What has been asked already: a file to which each prompt's outcome is appended, so that a killed run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TextIO

JOURNAL_FILE = "answers.jsonl"


class Verdict(StrEnum):
    """What became of a prompt."""

    RIGHT = "right"
    """Every answer was right: no pair."""
    GREEDY_WRONG = "greedy"
    """The greedy answer is the rejected one."""
    SAMPLE_WRONG = "sample"
    """The greedy answer was right, a sampled one is the rejected one."""
    UNUSABLE = "unusable"
    """The answer can be neither the right nor the rejected one."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one prompt; `rejected` is empty unless an answer was wrong, `ended` whether that one ended by itself."""

    verdict: Verdict
    rejected: str = ""
    ended: bool = True


class Journal:
    """Outcomes by the prompt's number, those of earlier attempts included."""

    def __init__(self, file: TextIO, outcomes: dict[int, Outcome]) -> None:
        self._file = file
        self.outcomes = outcomes

    @classmethod
    @contextmanager
    def open(cls, folder: Path, header: Mapping[str, str]) -> Iterator[Journal]:
        """The journal in a folder, for as long as the block lasts.

        Args:
            header: of what the outcomes hold; a journal with another one is begun anew, for example after another
                checkpoint was promoted, whose wrong answers are not this one's.
        """
        path = folder / JOURNAL_FILE
        outcomes = _read(path, header)
        draft = path.with_suffix(".draft")
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps(dict(header)) + "\n")
            for number, outcome in outcomes.items():
                file.write(_line(number, outcome))
            file.flush()
            os.fsync(file.fileno())
            draft.replace(path)
            yield cls(file, outcomes)

    def add(self, number: int, outcome: Outcome) -> None:
        """Notes what became of a prompt; survives the death of this process."""
        self.outcomes[number] = outcome
        self._file.write(_line(number, outcome))
        self._file.flush()


def _line(number: int, outcome: Outcome) -> str:
    fields = {
        "prompt": number,
        "verdict": outcome.verdict.value,
        "rejected": outcome.rejected,
        "ended": outcome.ended,
    }
    return json.dumps(fields) + "\n"


def _read(path: Path, header: Mapping[str, str]) -> dict[int, Outcome]:
    """What an earlier attempt noted under the same header, up to the first line that is torn."""
    outcomes: dict[int, Outcome] = {}
    if not path.exists():
        return outcomes
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        if not lines or json.loads(lines[0]) != dict(header):
            return outcomes
        for line in map(json.loads, lines[1:]):
            outcomes[int(line["prompt"])] = Outcome(Verdict(line["verdict"]), line["rejected"], line["ended"])
    except (ValueError, KeyError, TypeError):
        pass  # a crash of the machine may tear a file anywhere; what is lost is asked again
    return outcomes
