"""`fusionroute eval judge`: which of two answers is better, by a model behind an OpenAI API."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusionroute.cli.target import json_option

if TYPE_CHECKING:
    from evaluation.judging.pairs import ReadPairs
    from evaluation.judging.report import JudgingReport
    from evaluation.judging.running import Plan

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
JOURNAL = "judgements.jsonl"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be judged, by whom, and where it is written."""

    pairs: ReadPairs
    names: tuple[str, str]
    is_calibration: bool
    plan: Plan
    output: Path


@dataclass(frozen=True, slots=True)
class JudgeServer:
    """Where the judge is.

    Attributes:
        patience_seconds: how long it may be away or too busy.
    """

    url: str
    model: str
    api_key_file: Path | None
    patience_seconds: float


@click.command()
@click.argument("first", type=FILE, required=False)
@click.argument("second", type=FILE, required=False)
@click.option(
    "--calibrate", type=FILE, metavar="FILE", help="Judge pairs whose better answer is known instead."
)
@click.option("--url", required=True, help="Of the judge's server: http(s)://HOST:PORT, with or without /v1.")
@click.option(
    "--model", default="", metavar="NAME", help="As the server calls it; else the first that it serves."
)
@click.option(
    "--api-key-file", type=FILE, metavar="FILE",
    help="Whose first line is the key; else $FUSIONROUTE_REMOTE_API_KEY.",
)  # fmt: skip
@click.option(
    "--output", "-o", type=click.Path(file_okay=False, path_type=Path), default=Path("judged"), show_default=True,
    help="Folder for the journal and the report. One that holds an unfinished run is gone on with.",
)  # fmt: skip
@click.option(
    "--template", type=FILE, metavar="FILE",
    help="What the judge is asked, with $prompt, $answer_a, $answer_b and $how; else our own words.",
)  # fmt: skip
@click.option(
    "--reply-form", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="The verdict is the last line of a text, or JSON, where the server takes a schema.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Judge the first N pairs only.")
@click.option(
    "--repeats", type=click.IntRange(1, 100), default=1, show_default=True, help="Judgements per order."
)
@click.option(
    "--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="Of the first repeat."
)
@click.option(
    "--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 = greedy."
)
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Of one reply.")
@click.option(
    "--concurrent",
    type=click.IntRange(1, 1000),
    default=8,
    show_default=True,
    help="Questions at the same time.",
)
@click.option(
    "--patience", "patience_seconds", type=click.FloatRange(0), default=120.0, show_default=True, metavar="SECONDS",
    help="How long the judge may be away or too busy.",
)  # fmt: skip
@json_option
def judge(
    first: Path | None,
    second: Path | None,
    calibrate: Path | None,
    url: str,
    model: str,
    api_key_file: Path | None,
    output: Path,
    template: Path | None,
    reply_form: str,
    limit: int | None,
    repeats: int,
    seed: int,
    temperature: float,
    max_tokens: int,
    concurrent: int,
    patience_seconds: float,
    as_json: bool,
) -> None:
    """Have a model say which of two answers is better: those in FIRST or those in SECOND.

    Both files hold JSON lines with id, prompt and answer. Every pair is shown in both orders; where the judge
    contradicts itself the pair counts as a tie. How far the judge itself can be believed is what --calibrate tells,
    with JSON lines of prompt, chosen and rejected.

    Every judgement is in the journal as soon as it is made: after Ctrl-C the same command goes on.

    \b
    Example:
      fusionroute eval judge --calibrate pairs.jsonl.gz --url http://127.0.0.1:8000
      fusionroute eval judge fused.jsonl expert.jsonl --url http://127.0.0.1:8000 -o fused-expert
    """
    from evaluation.judging.prompting import JudgePrompt, ReplyForm
    from evaluation.judging.running import Plan

    form = ReplyForm(reply_form)
    prompt = JudgePrompt.from_file(template, form) if template else JudgePrompt(form=form)
    pairs, names = _read(first, second, calibrate, limit)
    plan = Plan(prompt, seed, repeats, temperature, max_tokens, concurrent)
    asked = Asked(pairs, names, calibrate is not None, plan, output)
    found = _judged(asked, JudgeServer(url, model, api_key_file, patience_seconds))
    text = found.to_markdown()
    (output / "report.md").write_text(text, encoding="utf-8")
    told = json.dumps(found.to_json(), indent=1, ensure_ascii=False)
    (output / "report.json").write_text(told + "\n", encoding="utf-8")
    click.echo(told if as_json else text)


def _read(
    first: Path | None, second: Path | None, calibrate: Path | None, limit: int | None
) -> tuple[ReadPairs, tuple[str, str]]:
    from evaluation.judging.pairs import read_answer_pairs, read_labelled_pairs

    if calibrate is not None:
        if first is not None:
            raise click.UsageError("give either FIRST and SECOND or --calibrate")
        read, names = read_labelled_pairs(calibrate), ("the better answer", "the worse one")
    elif first is None or second is None:
        raise click.UsageError("give FIRST and SECOND, two files of answers, or --calibrate")
    else:
        names = _names(first, second)
        read = read_answer_pairs(first, second)
    return replace(read, pairs=read.pairs[:limit]), names


def _names(first: Path, second: Path) -> tuple[str, str]:
    """The files' names; with their folders where they are called the same."""
    short = first.name.partition(".")[0], second.name.partition(".")[0]
    return short if short[0] != short[1] else (str(first), str(second))


def _judged(asked: Asked, server: JudgeServer) -> JudgingReport:
    journal = asked.output / JOURNAL
    try:
        return asyncio.run(_judge(asked, server))
    except (asyncio.CancelledError, KeyboardInterrupt):
        click.echo(f"what was judged is kept in {journal}: the same command goes on", err=True)
        raise KeyboardInterrupt from None


async def _judge(asked: Asked, server: JudgeServer) -> JudgingReport:
    from evaluation.judging.journal import JudgingJournal
    from evaluation.judging.report import report_of
    from evaluation.judging.running import judge_pairs
    from fusionroute.remote_models import RemoteApi, RemoteLimits, RemoteModel

    pairs, plan = asked.pairs.pairs, asked.plan
    limits = RemoteLimits(patience_seconds=server.patience_seconds)
    async with RemoteModel.open(
        server.url, api=RemoteApi.OPENAI, model=server.model, api_key_file=server.api_key_file, limits=limits
    ) as model:
        with (
            JudgingJournal.open(asked.output / JOURNAL, plan.facts(model, pairs)) as journal,
            _progress() as show,
        ):
            await judge_pairs(model, pairs, plan, journal, show)
        return report_of(
            pairs,
            journal.judgements,
            plan,
            judge=model.identity,
            names=asked.names,
            is_calibration=asked.is_calibration,
            num_left_out=asked.pairs.num_left_out,
        )


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Tells how many questions are answered, and how long the rest will take at the pace so far."""
    from fusionroute.cli.train_progress import shown_progress
    from trainer.run_context import RunProgress

    begun_at, num_before = time.monotonic(), -1
    with shown_progress() as show:

        def told(num_done: int, num_all: int) -> None:
            nonlocal num_before
            num_before = num_done if num_before < 0 else num_before
            fresh = num_done - num_before
            left = (time.monotonic() - begun_at) / fresh * (num_all - num_done) if fresh else None
            show(RunProgress("judging", num_done, num_all, remaining_seconds=left))

        yield told
