"""`fusionroute eval judge` before servers whose taste is known, and before our own router, which has none."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from evaluation.judging.journal import JudgingJournal
from evaluation.judging.judgements import PairVerdict
from evaluation.judging.pairs import AnswerPair
from evaluation.judging.prompting import JudgePrompt, ReplyForm
from evaluation.judging.report import JudgingReport, report_of
from evaluation.judging.running import Plan, judge_pairs
from fusionroute.cli.eval_judge import judge as command
from fusionroute.cli.group import CommandGroup
from fusionroute.errors import InvalidRequest, Unavailable
from fusionroute.remote_models import KEY_VARIABLE, RemoteApi, RemoteLimits, RemoteModel
from tests import judging_fakes as fakes
from tests.judges.talking_models import talking_stack
from tests.judging_fakes import FakeJudge, serving

PAIRS = [AnswerPair(str(number), f"p{number}", "long" * (1 + number % 2), "medium") for number in range(12)]
"""Six answers of four characters and six of eight, against six characters."""
QUICK = RemoteLimits(attempt_seconds=5.0, patience_seconds=3.0)
PLAN = Plan(num_concurrent=4, seed=40)


async def judged(
    url: str, path: Path, plan: Plan = PLAN, pairs: list[AnswerPair] = PAIRS, limits: RemoteLimits = QUICK
) -> JudgingReport:
    async with RemoteModel.open(url, api=RemoteApi.OPENAI, limits=limits) as model:
        with JudgingJournal.open(path / "j.jsonl", plan.facts(model, pairs)) as journal:
            await judge_pairs(model, pairs, plan, journal, lambda *_: None)
        return report_of(pairs, journal.judgements, plan, judge=model.identity, names=("one", "other"))


async def test_a_judge_that_prefers_the_longer_answer_is_consistent_and_says_so_of_every_pair(tmp_path):
    fake = FakeJudge()
    with serving(fake) as url:
        report = await judged(url, tmp_path)
    assert [row[2] for row in report.rows] == [PairVerdict.LOSS, PairVerdict.WIN] * 6
    assert report.total.win_rate is not None and report.total.win_rate.value == 0.5
    assert report.total.consistent is not None and report.total.consistent.value == 1.0
    assert not report.behaviour.is_biased
    assert "No difference is shown" in report.to_markdown()
    assert fake.most_at_once <= PLAN.num_concurrent
    assert {body["seed"] for body in fake.bodies} == set(report.seeds) == {40}


async def test_a_judge_that_prefers_what_is_shown_first_decides_nothing_and_is_found_biased(tmp_path):
    with serving(FakeJudge(fakes.prefers_the_one_shown_first)) as url:
        report = await judged(url, tmp_path)
    assert report.total.verdicts[PairVerdict.INCONSISTENT] == len(PAIRS)
    assert report.behaviour.is_biased and report.behaviour.num_first_twice == len(PAIRS)
    assert report.total.p_value == 1.0


async def test_nobody_is_asked_to_choose_between_an_answer_and_itself(tmp_path):
    fake = FakeJudge(fakes.prefers_the_one_shown_first)
    pairs = [PAIRS[0], replace(PAIRS[1], second=PAIRS[1].first)]
    with serving(fake) as url:
        report = await judged(url, tmp_path, pairs=pairs)
    assert [row[2] for row in report.rows] == [PairVerdict.INCONSISTENT, PairVerdict.TIE]
    assert len(fake.bodies) == 2 and "1 pairs have the same answer twice: ties" in report.to_markdown()


async def test_a_judge_that_always_ties_shows_no_difference(tmp_path):
    with serving(FakeJudge(fakes.always_ties)) as url:
        report = await judged(url, tmp_path)
    assert report.total.verdicts[PairVerdict.TIE] == len(PAIRS)
    assert report.behaviour.chose_shown_first is None and report.behaviour.num_ties == 2 * len(PAIRS)
    assert report.total.win_rate is not None and report.total.win_rate.value == 0.5


async def test_nonsense_is_asked_again_with_another_seed_and_a_draw_and_then_counted(tmp_path):
    for name, nonsense, is_mended in (("once", {40}, True), ("always", {40, 41}, False)):
        fake = FakeJudge(nonsense_seeds=frozenset(nonsense))
        with serving(fake) as url:
            report = await judged(url, tmp_path / name)
        number = 2 * len(PAIRS)
        assert sorted(body["seed"] for body in fake.bodies) == [40] * number + [41] * number
        assert {body["temperature"] for body in fake.bodies if body["seed"] == 41} == {0.7}
        seen = report.behaviour
        assert seen.num_unparsable_replies == (number if is_mended else 2 * number)
        assert (seen.num_mended, seen.num_unparsable) == ((number, 0) if is_mended else (0, number))
        assert report.total.verdicts[PairVerdict.UNJUDGED] == (0 if is_mended else len(PAIRS))
        assert (report.total.win_rate is None) == (not is_mended)
        assert ("No pair has a verdict" in report.to_markdown()) == (not is_mended)


async def test_a_judge_that_is_too_busy_at_first_is_waited_for(tmp_path):
    fake = FakeJudge(refusals=[429] * 5 + [503])
    with serving(fake) as url:
        report = await judged(url, tmp_path)
    assert report.total.num_judged == len(PAIRS) and len(fake.bodies) == 2 * len(PAIRS) + 6


async def test_verdicts_in_json_equal_those_in_text_and_a_server_without_schemas_says_so(tmp_path):
    plan = replace(PLAN, prompt=JudgePrompt(form=ReplyForm.JSON))
    fake = FakeJudge()
    with serving(fake) as url:
        as_json = await judged(url, tmp_path / "json", plan)
        as_text = await judged(url, tmp_path / "text")
    assert as_json.rows == as_text.rows
    told = fake.bodies[0]["response_format"]
    assert told["type"] == "json_schema" and told["json_schema"]["strict"]
    assert told["json_schema"]["schema"]["required"] == ["reasons", "verdict"]
    with serving(FakeJudge(takes_schemas=False)) as url, pytest.raises(ExceptionGroup) as raised:
        await judged(url, tmp_path / "refused", plan)
    assert raised.group_contains(InvalidRequest, match="response_format is not supported")


async def test_what_is_too_long_for_the_judge_is_left_out_and_counted(tmp_path):
    with serving(FakeJudge(too_long="p3\n")) as url:
        report = await judged(url, tmp_path)
    assert report.behaviour.num_too_long == 2
    assert report.total.verdicts[PairVerdict.UNJUDGED] == 1
    assert (report.total.least, report.total.most) == (5 / 12, 6 / 12)
    assert "1 of 12 verdicts are missing" in report.to_markdown()


async def test_a_run_that_was_interrupted_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
    reached, go_on = threading.Event(), threading.Event()
    fake = FakeJudge()

    def halfway() -> None:
        if len(fake.bodies) > len(PAIRS):
            if len(fake.bodies) == len(PAIRS) + PLAN.num_concurrent:
                reached.set()
            go_on.wait(10)

    fake.before = halfway
    with serving(fake) as url:
        run = asyncio.create_task(judged(url, tmp_path))
        assert await asyncio.to_thread(reached.wait, 10)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        go_on.set()
        num_kept = len((tmp_path / "j.jsonl").read_bytes().splitlines()) - 1
        assert num_kept == len(PAIRS)
        with (tmp_path / "j.jsonl").open("ab") as file:
            file.write(b'{"ask": {"pair": "to')
        num_before = len(fake.bodies)
        resumed = await judged(url, tmp_path)
        assert len(fake.bodies) - num_before == 2 * len(PAIRS) - num_kept
        assert resumed == await judged(url, tmp_path / "undisturbed")
        further = await judged(url, tmp_path, replace(PLAN, num_repeats=2))
    assert len(further.rows) == 2 * len(PAIRS) and further.seeds == (40, 42)


async def test_a_judge_that_goes_away_ends_the_run_with_what_it_said_kept(tmp_path):
    fake = FakeJudge(refusals=[])

    def gone() -> None:
        if len(fake.bodies) > 6:
            fake.refusals.extend([503] * 4)

    fake.before = gone
    with serving(fake) as url, pytest.raises(ExceptionGroup) as raised:
        await judged(url, tmp_path, limits=RemoteLimits(5.0, 0.1))
    assert raised.group_contains(Unavailable)
    assert len((tmp_path / "j.jsonl").read_bytes().splitlines()) > 5


# --- the command ---


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Any:
    group = CommandGroup(name="eval", commands_at={"judge": "fusionroute.cli.eval_judge:judge"})
    monkeypatch.setenv(KEY_VARIABLE, "k-secret-1")

    def run(*arguments: Any) -> Result:
        return CliRunner().invoke(group, ["judge", *map(str, arguments)])

    return run


@pytest.fixture
def own_signals() -> Iterator[None]:
    import signal

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def written(path: Path, *rows: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.usefixtures("own_signals")
def test_the_command_judges_two_files_and_never_shows_the_key(tmp_path, invoke):
    first = written(tmp_path / "fused.jsonl", {"id": "1", "prompt": "p", "answer": "much longer"})
    second = written(
        tmp_path / "expert.jsonl",
        {"id": "1", "prompt": "p", "answer": "short"},
        {"id": "2", "prompt": "q", "answer": "alone"},
    )
    with serving(FakeJudge()) as url:
        done = invoke(first, second, "--url", url, "-o", tmp_path / "out", "--seed", 7)
    assert done.exit_code == 0, done.output
    report = (tmp_path / "out" / "report.md").read_text()
    assert report in done.stdout and "# fused against expert" in report
    assert (
        "| all | 1 | 0 | 0 | 0 | 0 | 1.000 [" in report
        and "1 answers have no counterpart and were left out" in report
    )
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["rows"] == [{"id": "1", "repeat": 0, "verdict": "win"}] and told["seeds"] == [7]
    assert "judging 2/2" in done.stderr
    everything = done.output + "".join(file.read_text() for file in (tmp_path / "out").iterdir())
    assert "k-secret" not in everything


@pytest.mark.usefixtures("own_signals")
def test_calibration_tells_the_judges_own_accuracy_by_group(tmp_path, invoke):
    rows = [
        {"prompt": f"p{n}", "chosen": "right" * (1 + (n > 0)), "rejected": "misled", "source": f"s{n % 2}"}
        for n in range(4)
    ]
    with serving(FakeJudge()) as url:
        options = ("--url", url, "-o", tmp_path / "out", "--json")
        done = invoke("--calibrate", written(tmp_path / "gold.jsonl", *rows), *options)
        changed = written(tmp_path / "other.jsonl", *rows[1:])
        refused = invoke("--calibrate", changed, *options)
    told = json.loads(done.stdout)
    assert told["total"]["right"]["value"] == 0.75 and told["total"]["right"]["high"] < 1.0
    assert {each["group"]: each["right"]["value"] for each in told["groups"]} == {"s0": 0.5, "s1": 1.0}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| s0 | 1 | 1 | 0 | 0 | 0 | 0.500 [" in report and "a coin has 0.500" in report
    assert refused.exit_code == 4 and "was begun with; or another output" in refused.stderr


def test_the_command_wants_two_files_or_labelled_pairs(tmp_path, invoke):
    file = written(tmp_path / "a.jsonl", {"id": "1", "prompt": "p", "answer": "a"})
    for arguments in ((), (file,), (file, file, "--calibrate", file)):
        done = invoke(*arguments, "--url", "http://127.0.0.1:9")
        assert done.exit_code == 2 and "FIRST and SECOND" in done.stderr
    assert isinstance(command, click.Command)


# --- our own router ---


async def test_random_weights_of_our_router_judge_only_where_a_schema_makes_them(tmp_path):
    plan = replace(PLAN, max_tokens=12, prompt=JudgePrompt("$prompt $answer_a $answer_b $how"))
    pairs = [*PAIRS[:3], replace(PAIRS[3], prompt="very long " * 300)]
    async with talking_stack(tmp_path / "models") as stack:
        assert stack.router.http_url is not None
        report = await judged(stack.router.http_url, tmp_path, plan, pairs, RemoteLimits())
        as_json = replace(plan, prompt=replace(plan.prompt, form=ReplyForm.JSON), max_tokens=400)
        forced = await judged(stack.router.http_url, tmp_path / "json", as_json, pairs[:1], RemoteLimits())
    assert report.total.verdicts[PairVerdict.UNJUDGED] == len(pairs)
    assert (report.behaviour.num_unparsable, report.behaviour.num_too_long) == (6, 2)
    assert (forced.behaviour.num_asks, forced.behaviour.num_unparsable) == (2, 0)
