"""Answers are kept as they come: nothing is asked twice, and nothing of somebody else is taken for ours."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from evaluation.journal import Journal
from evaluation.questions import Question
from evaluation.running import ask_all
from fusionroute.errors import InvalidRequest

WHAT = {"who": "sum", "questions": "abc"}


def test_entries_are_there_again_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.jsonl"
    with Journal.open(path, WHAT) as journal:
        journal.add("a/1", {"text": "zwölf\u2028x"})
        journal.add("a/2", {"text": "b"})
    with path.open("ab") as file:
        file.write(b'{"id": "a/3", "text": "to')
    with Journal.open(path, WHAT) as journal:
        assert journal.entries == {"a/1": {"text": "zwölf\u2028x"}, "a/2": {"text": "b"}}
        journal.add("a/3", {"text": "whole"})
    assert Journal.read(path)["a/3"] == {"text": "whole"}
    assert len(Journal.read(path)) == 3


def test_a_journal_of_somebody_else_is_refused_by_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Journal.open(path, WHAT) as journal:
        journal.add("a/1", {})
    with (
        pytest.raises(InvalidRequest, match=r"questions differ; choose another folder"),
        Journal.open(path, {**WHAT, "questions": "xyz"}),
    ):
        pass
    assert len(Journal.read(path)) == 1, "and it is left as it was"


def test_a_journal_that_was_torn_in_its_first_line_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"who": "su')
    with Journal.open(path, WHAT) as journal:
        assert journal.entries == {}
        journal.add("a/1", {"x": 1})
    assert Journal.read(path) == {"a/1": {"x": 1}}


def questions(*prompts: str) -> list[Question]:
    return [Question(f"t/{number}", "t", prompt, reference=prompt) for number, prompt in enumerate(prompts)]


async def test_the_same_prompt_is_asked_once_and_what_is_known_not_at_all(tmp_path: Path) -> None:
    asked: Counter[str] = Counter()
    done: list[int] = []

    async def ask(question: Question) -> dict[str, Any]:
        asked[str(question.prompt)] += 1
        await asyncio.sleep(0)
        return {"text": str(question.prompt).upper()}

    with Journal.open(tmp_path / "j.jsonl", WHAT) as journal:
        journal.add("t/0", {"text": "known"})
        await ask_all(
            questions("a", "b", "b", "c", "b"), ask, journal, num_concurrent=3, on_progress=done.append
        )
    assert asked == {"b": 1, "c": 1}
    entries = Journal.read(tmp_path / "j.jsonl")
    assert {id_: entry["text"] for id_, entry in entries.items()} == {
        "t/0": "known", "t/1": "B", "t/2": "B", "t/3": "C", "t/4": "B"
    }  # fmt: skip
    assert sum(done) == 5


async def test_what_had_come_is_kept_when_a_request_fails(tmp_path: Path) -> None:
    async def ask(question: Question) -> dict[str, Any]:
        if question.prompt == "bad":
            raise ConnectionError("gone")
        return {"text": "x"}

    with pytest.raises(ExceptionGroup), Journal.open(tmp_path / "j.jsonl", WHAT) as journal:
        await ask_all(questions("a", "b", "bad", "c"), ask, journal, num_concurrent=1)
    assert set(Journal.read(tmp_path / "j.jsonl")) == {"t/0", "t/1"}


async def test_no_more_requests_are_in_flight_than_allowed(tmp_path: Path) -> None:
    running, most = 0, 0

    async def ask(question: Question) -> dict[str, Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return {}

    with Journal.open(tmp_path / "j.jsonl", WHAT) as journal:
        await ask_all(questions(*map(str, range(40))), ask, journal, num_concurrent=5)
    assert most == 5
