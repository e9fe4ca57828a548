"""A suite in a file, from its questions to the report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from evaluation.findings import Findings
    from evaluation.suites.asking import Heard
    from evaluation.suites.config import Suite

DEFAULT_ADDRESS = "127.0.0.1:50050"


def run_suite(
    path: Path, output: Path, address: str | None, max_questions: int | None, console: Console
) -> Findings:
    """Asks a running router, and whoever else the suite names; writes the report and returns what it shows.

    Raises:
        FusionRouteError: the suite, one of its files, or a service is not as it must be.
    """
    from evaluation.report import write_report
    from evaluation.scores import Scores
    from evaluation.suites.config import Suite
    from evaluation.suites.results import findings_of, write_answers

    suite = Suite.from_toml(path)
    heard = _heard(suite, output, address or DEFAULT_ADDRESS, max_questions, console)
    limit = f" --per-task {max_questions}" if max_questions else ""
    command = f"fusionroute eval run --suite {path.name}{limit} --output {output.name}"
    findings = findings_of(suite, heard, {"command": command})
    write_report(findings, output)
    by_id = {each.question.id: each.question for each in heard.outcomes}
    Scores.of(by_id.values(), heard.notes, heard.outcomes, heard.views).write(output)
    if by_id:
        write_answers(heard.outcomes, output / "written")
    return findings


def _heard(suite: Suite, output: Path, address: str, max_questions: int | None, console: Console) -> Heard:
    from evaluation.suites.asking import ask_suite
    from evaluation.suites.loading import loaded_tasks, loaded_texts
    from fusionroute.client import RouterClient

    tasks, texts = loaded_tasks(suite, max_questions), loaded_texts(suite, max_questions)

    async def ask() -> Heard:
        async with RouterClient.open(address) as router:
            return await ask_suite(suite, tasks, texts, router, output, on_progress)

    totals = {task.title: len(task.questions) * len(suite.sampling.seeds) for task in tasks}
    with _bars(console, totals | {"texts": len(texts)}) as on_progress:
        return asyncio.run(ask())


@contextmanager
def _bars(console: Console, totals: dict[str, int]) -> Iterator[Callable[[str, int], None]]:
    """A bar with the time left for each system and task, shown from its first answer on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        shown: dict[str, Any] = {}

        def advance(what: str, num_done: int) -> None:
            if what not in shown:
                shown[what] = bars.add_task(what, total=totals.get(what.rpartition(": ")[2] or what))
            bars.advance(shown[what], num_done)

        yield advance
