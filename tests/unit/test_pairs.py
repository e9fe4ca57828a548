"""Which answers become rejected ones, and what is written of them."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusionroute.errors import InvalidRequest, Reason, TrainingFailed
from trainer.answering import Answer, Ending
from trainer.config import DataTable, PairsJob
from trainer.data import GoldPrompt
from trainer.pair_journal import JOURNAL_FILE, Journal, Outcome, Verdict
from trainer.pairs import ask_all, judged, pair_rows, seed_of, summary, write_rows
from trainer.run_context import RunContext, RunProgress, Stop, Stopped

Script = Callable[[str, float], str]


class Scripted:
    """Answers by a function of prompt and temperature; notes what it was asked.

    Attributes:
        asked: (prompt, temperature, seed) of every question.
        most_at_once: questions that were open at the same time.
    """

    def __init__(self, script: Script, checkpoint: str = "abc", seconds: float = 0.0) -> None:
        self.script, self.checkpoint, self.seconds = script, checkpoint, seconds
        self.asked: list[tuple[str, float, int]] = []
        self.open = self.most_at_once = 0

    async def answer(self, prompt: GoldPrompt, temperature: float, seed: int) -> Answer:
        assert isinstance(prompt.prompt, str)
        self.asked.append((prompt.prompt, temperature, seed))
        self.open += 1
        self.most_at_once = max(self.most_at_once, self.open)
        await asyncio.sleep(self.seconds)
        self.open -= 1
        text = self.script(prompt.prompt, temperature)
        cut = text.endswith("...")
        return Answer(text.removesuffix("..."), Ending.CUT if cut else Ending.ENDED, self.checkpoint)


def prompts(*texts: str) -> list[GoldPrompt]:
    return [
        GoldPrompt(text, (1, 2), f"gold {text}", f"file: line {line}") for line, text in enumerate(texts, 1)
    ]


def job(tmp_path: Path, **changes) -> PairsJob:
    data = DataTable(files=(tmp_path / "data.jsonl",))
    return PairsJob(data=data, output=tmp_path / "pairs.jsonl", **changes)


def collect(given, answerer: Scripted, config: PairsJob, folder: Path, **context) -> dict[int, Outcome]:
    with Journal.open(folder, {"asked": "these"}) as journal:
        asyncio.run(ask_all(given, answerer, config, "abc", journal, RunContext(folder, **context)))
        return journal.outcomes


def wrong_where_asked(prompt: str, temperature: float) -> str:
    """Prompts say themselves at which temperature they are answered wrongly."""
    is_wrong = ("greedy" in prompt and temperature == 0) or ("sample" in prompt and temperature > 0)
    return f"wrong {prompt}" if is_wrong else f"gold {prompt}"


def test_a_wrong_greedy_answer_is_rejected_and_a_right_one_is_tried_again_at_temperature(tmp_path: Path):
    given = prompts("greedy", "sample", "never")
    answerer = Scripted(wrong_where_asked)
    outcomes = collect(given, answerer, job(tmp_path, temperature=0.7), tmp_path)
    assert {number: outcome.verdict for number, outcome in outcomes.items()} == {
        0: Verdict.GREEDY_WRONG,
        1: Verdict.SAMPLE_WRONG,
        2: Verdict.RIGHT,
    }
    temperatures = {
        text: [heat for asked, heat, _ in answerer.asked if asked == text] for text in ("greedy", "sample")
    }
    assert temperatures == {"greedy": [0.0], "sample": [0.0, 0.7]}
    rows = list(pair_rows(given, outcomes))
    assert rows == [
        {"prompt": "greedy", "chosen": "gold greedy", "rejected": "wrong greedy", "source": "greedy"},
        {"prompt": "sample", "chosen": "gold sample", "rejected": "wrong sample", "source": "sample"},
    ]


def test_samples_end_with_the_first_wrong_one_and_have_seeds_of_their_own(tmp_path: Path):
    answerer = Scripted(wrong_where_asked)
    collect(prompts("never", "sample"), answerer, job(tmp_path, samples=3, concurrency=1), tmp_path)
    assert [text for text, _, _ in answerer.asked] == ["never"] * 4 + ["sample"] * 2
    assert len({seed for _, _, seed in answerer.asked}) == 6
    assert seed_of(0, 1, 2) == seed_of(0, 1, 2) != seed_of(1, 1, 2)
    assert 0 <= seed_of(0, 0, 0) < 2**64


def test_without_samples_only_greedy_answers_count(tmp_path: Path):
    answerer = Scripted(wrong_where_asked)
    outcomes = collect(prompts("sample"), answerer, job(tmp_path, samples=0), tmp_path)
    assert (outcomes[0].verdict, len(answerer.asked)) == (Verdict.RIGHT, 1)


@pytest.mark.parametrize(
    ("text", "ending", "verifier", "verdict"),
    [
        ("7", Ending.ENDED, "exact", Verdict.RIGHT),
        ("8", Ending.ENDED, "exact", Verdict.GREEDY_WRONG),
        ("8", Ending.CUT, "exact", Verdict.GREEDY_WRONG),
        ("7", Ending.CUT, "exact", Verdict.UNUSABLE),
        ("it is 7", Ending.CUT, "number", Verdict.RIGHT),
        (" ", Ending.ENDED, "exact", Verdict.UNUSABLE),
        ("8\ufffd", Ending.ENDED, "exact", Verdict.UNUSABLE),
        ("", Ending.REFUSED, "exact", Verdict.UNUSABLE),
    ],
)
def test_an_answer_is_judged_by_text_and_end(text: str, ending: Ending, verifier: str, verdict: Verdict):
    assert judged(Answer(text, ending, "abc"), "7", verifier) is verdict


def test_an_answer_that_was_cut_off_is_marked_so_that_no_end_is_learnt_from_it(tmp_path: Path):
    given = prompts("greedy")
    outcomes = collect(given, Scripted(lambda prompt, _: "on and on..."), job(tmp_path), tmp_path)
    (row,) = pair_rows(given, outcomes)
    assert (row["rejected"], row["rejected_ended"]) == ("on and on", False)
    assert summary(outcomes)["cut"] == 1


def test_a_conversation_stays_one():
    messages = ({"role": "user", "content": "hi"},)
    given = [GoldPrompt(messages, (1,), "hello", "file: line 1")]
    (row,) = pair_rows(given, {0: Outcome(Verdict.GREEDY_WRONG, "bye")})
    assert row["prompt"] == [{"role": "user", "content": "hi"}]
    assert row["chosen"] == [{"role": "assistant", "content": "hello"}]
    assert row["rejected"] == [{"role": "assistant", "content": "bye"}]


def test_as_many_questions_are_open_as_configured(tmp_path: Path):
    answerer = Scripted(wrong_where_asked, seconds=0.01)
    collect(prompts(*(f"greedy {n}" for n in range(20))), answerer, job(tmp_path, concurrency=5), tmp_path)
    assert answerer.most_at_once == 5


def test_what_was_asked_before_a_stop_is_not_asked_again(tmp_path: Path):
    given = prompts(*(f"greedy {n}" for n in range(12)))
    stop = Stop()
    first = Scripted(wrong_where_asked, seconds=0.05)
    threading.Timer(0.3, stop.request).start()
    with pytest.raises(Stopped):
        collect(given, first, job(tmp_path, concurrency=1), tmp_path, stop=stop)
    with (tmp_path / JOURNAL_FILE).open("a") as journal:
        journal.write('{"prompt": 11, "verdi')  # torn by a kill
    second = Scripted(wrong_where_asked)
    outcomes = collect(given, second, job(tmp_path, concurrency=1), tmp_path)
    assert 0 < len(first.asked) < 12
    assert len(outcomes) == 12
    # The answer that was broken off is the only one asked twice.
    assert 12 <= len(first.asked) + len(second.asked) <= 13
    undisturbed = collect(given, Scripted(wrong_where_asked), job(tmp_path), fresh(tmp_path))
    assert list(pair_rows(given, outcomes)) == list(pair_rows(given, undisturbed))


def test_a_stop_does_not_wait_for_answers(tmp_path: Path):
    stop = Stop()
    threading.Timer(0.2, stop.request).start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        collect(
            prompts("greedy"), Scripted(wrong_where_asked, seconds=60), job(tmp_path), tmp_path, stop=stop
        )
    assert time.monotonic() - began < 20


def fresh(tmp_path: Path) -> Path:
    folder = tmp_path / "fresh"
    folder.mkdir()
    return folder


def test_outcomes_of_another_question_or_checkpoint_are_not_taken_over(tmp_path: Path):
    with Journal.open(tmp_path, {"checkpoint": "old"}) as journal:
        journal.add(0, Outcome(Verdict.RIGHT))
    with Journal.open(tmp_path, {"checkpoint": "old"}) as journal:
        assert journal.outcomes == {0: Outcome(Verdict.RIGHT)}
    with Journal.open(tmp_path, {"checkpoint": "new"}) as journal:
        assert journal.outcomes == {}


def test_another_checkpoint_meanwhile_ends_the_run_by_name(tmp_path: Path):
    answerer = Scripted(wrong_where_asked, checkpoint="other")
    with pytest.raises(TrainingFailed, match="serves checkpoint other") as caught:
        collect(prompts("greedy"), answerer, job(tmp_path), tmp_path)
    assert caught.value.reason is Reason.CHECKPOINT_CHANGED


def test_progress_says_how_many_were_wrong(tmp_path: Path):
    told: list[RunProgress] = []
    answerer = Scripted(wrong_where_asked, seconds=0.3)
    given = prompts(*(f"greedy {n}" for n in range(9)))
    collect(given, answerer, job(tmp_path, concurrency=1), tmp_path, report=told.append)
    assert told
    assert (told[0].stage, told[0].num_steps) == ("pairs", 9)
    assert told[0].metrics["greedy_wrong"] == told[0].step
    assert told[0].remaining_seconds is not None
    assert (told[-1].step, told[-1].metrics["greedy_wrong"]) == (9, 9)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_the_file_is_written_whole_the_same_each_time_and_only_over_itself(name: str, tmp_path: Path):
    rows, output = [{"prompt": "é", "chosen": "a", "rejected": "b"}], tmp_path / "out" / name
    write_rows(rows, output, tmp_path)
    data = output.read_bytes()
    text = (gzip.decompress(data) if name.endswith("gz") else data).decode()
    assert [json.loads(line) for line in text.splitlines()] == rows
    if name.endswith("gz"):
        assert data[4:8] == bytes(4), "the time of writing would make every file another"
    write_rows(rows, output, tmp_path)
    assert output.read_bytes() == data
    assert list(output.parent.iterdir()) == [output]
    with pytest.raises(InvalidRequest, match="exists already"):
        write_rows([*rows, *rows], output, tmp_path)
    assert output.read_bytes() == data


def test_a_name_of_another_format_is_refused(tmp_path: Path):
    with pytest.raises(InvalidRequest, match=r"\.jsonl or \.jsonl\.gz"):
        write_rows([], tmp_path / "pairs.csv", tmp_path)


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(5)
