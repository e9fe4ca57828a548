"""The demo's table: every system asked every item through the services, and what the numbers say in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from evaluation.questions import Outcome, Question
from evaluation.rounds import run_rounds
from evaluation.systems.answering import RouterWriter
from evaluation.systems.ways import GATED, ROUTING_ONLY, SUM, Way, main_ways, rule_names
from evaluation.table import compare, price_sentence, score_table, scores, sentence, to_json
from evaluation.tasks.lab import verify
from fusionroute.client import RouterClient

if TYPE_CHECKING:
    from rich.console import Console

NUM_CONCURRENT = 16

PREFERRED_SUM = SUM.of("cdpo", "after CDPO")
"""Asked of a router that has been through phase II; all others of the one before."""

LIMITS = (
    "Gap tasks need what no expert was taught: experts and routing only cannot answer them. CDPO has repaired",
    "mistakes of the plain sum; the gated rules need no preference phase. The lab favours them: almost every",
    "token is known to one model alone, and the gate has seen each kind of gap.",
    "Shares: Wilson intervals. Differences: paired bootstrap over the facts asked. Held-out items, one seed.",
)


async def ask(
    console: Console,
    address: str,
    systems: Sequence[Way],
    rounds: Sequence[Sequence[Question]],
    budget_seconds: float = float("inf"),
) -> list[Outcome]:
    """Asks the systems every question, as many rounds as the budget allows.

    Args:
        console: to show the progress on.
        address: of the router that answers.
        systems: ways to ask it.
        rounds: a question of every task each.
        budget_seconds: no further round is begun after so long.
    """
    async with RouterClient.open(address) as router:

        async def answered(question: Question, way: Way) -> Outcome:
            return await RouterWriter(router, way, verify).outcome(question)

        with _counter(console, sum(len(each) for each in rounds) * len(systems)) as on_outcome:
            return await run_rounds(
                answered, rounds, systems,
                num_concurrent=NUM_CONCURRENT, budget_seconds=budget_seconds, on_outcome=on_outcome,
            )  # fmt: skip


async def available_systems(address: str) -> list[Way]:
    """The systems that the router at an address can be asked as."""
    async with RouterClient.open(address) as router:
        info = await router.info()
    return main_ways([slot.slot for slot in info.slots], rule_names(info.available_combine))


def num_rounds_of(outcomes: Sequence[Outcome]) -> int:
    """How many whole rounds were asked: each asks every task once of every system."""
    tasks = {outcome.question.task for outcome in outcomes}
    systems = {outcome.system for outcome in outcomes}
    return len(outcomes) // (len(tasks) * len(systems))


def show_scores(console: Console, outcomes: Sequence[Outcome], systems: Sequence[Way]) -> dict[str, Any]:
    """Prints the table of these systems and what it says, and returns the same for programs."""
    rows, present = scores(outcomes, systems), set(systems)
    pairs = [
        (SUM, ROUTING_ONLY),
        (PREFERRED_SUM, SUM),
        (PREFERRED_SUM, ROUTING_ONLY),
        *((rule, PREFERRED_SUM) for rule in GATED),
    ]
    comparisons = [compare(outcomes, *pair) for pair in pairs if present.issuperset(pair)]
    num_gap = sum(outcome.question.strata["coverage"] == "gap" for outcome in outcomes) // len(rows)
    num_covered = len(outcomes) // len(rows) - num_gap
    console.print(score_table(rows, num_covered, num_gap))
    console.print()
    for each in comparisons:
        console.print(f"   {sentence(each)}", markup=False)
    price = next((each for each in comparisons if each.first == PREFERRED_SUM and each.second == ROUTING_ONLY), None)
    if price is not None:
        console.print(f"   {price_sentence(price)}", style="bold", markup=False)
    console.print()
    for line in LIMITS:
        console.print(f"   {line}", style="dim", markup=False)
    return {"num_covered": num_covered, "num_gap": num_gap, **to_json(rows, comparisons)}


@contextmanager
def _counter(console: Console, num_answers: int) -> Iterator[Callable[[Outcome], None]]:
    """Shows how many answers have come: a bar on a terminal, now and then a line elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("   answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("answers", total=num_answers)
        num_done = 0

        def count(outcome: Outcome) -> None:
            nonlocal num_done
            num_done += 1
            bars.advance(task)
            if not console.is_terminal and num_done % 1000 == 0:
                console.print(f"   {num_done} answers, at most {num_answers}", markup=False)

        yield count
