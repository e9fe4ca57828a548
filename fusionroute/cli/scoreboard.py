"""The demo's table: every system asked every item through the services, and what the numbers say in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from evaluation.items import is_covered, longest_answer_tokens, rounds_of_items
from evaluation.runner import Outcome, ServedAnswerer, run_rounds
from evaluation.systems import FUSED_SUM, GATED, ROUTING_ONLY, systems_of
from evaluation.table import compare, score_table, scores, sentence, to_json

if TYPE_CHECKING:
    from rich.console import Console

    from fusionroute.client import RouterClient

NUM_CONCURRENT = 16

LIMITS = (
    "Gap tasks need what no expert was taught: experts and routing only cannot answer them. This router has",
    "had no preference phase, which repairs most of the plain sum's gap answers. The lab favours the gated",
    "rules: almost every token is known to one model alone, and the gate has seen each kind of gap.",
    "Shares: Wilson intervals. Differences: paired bootstrap over the facts asked. Held-out items, one seed.",
)


async def measure(
    console: Console, router: RouterClient, num_rounds: int, budget_seconds: float, seed: int = 0
) -> dict[str, Any]:
    """Asks, prints the table and what it says, and returns the same for programs.

    Args:
        console: to print on.
        router: that answers.
        num_rounds: items of each task at most.
        budget_seconds: no further round is begun after so long.
        seed: of the draw of items.
    """
    info = await router.info()
    systems = systems_of([slot.slot for slot in info.slots], info.available_combine)
    rounds = rounds_of_items(num_rounds, seed)
    answerer = ServedAnswerer(router, longest_answer_tokens(item for each in rounds for item in each) + 2)
    with _counter(console, num_rounds * len(rounds[0]) * len(systems)) as on_outcome:
        outcomes = await run_rounds(
            answerer, rounds, systems,
            num_concurrent=NUM_CONCURRENT, budget_seconds=budget_seconds, on_outcome=on_outcome,
        )  # fmt: skip
    rows = scores(outcomes)
    present = {row.system for row in rows}
    pairs = [(FUSED_SUM, ROUTING_ONLY), *((rule, FUSED_SUM) for rule in GATED)]
    comparisons = [compare(outcomes, *pair) for pair in pairs if present.issuperset(pair)]
    num_covered, num_gap = _item_counts(outcomes, len(systems))
    console.print(score_table(rows, num_covered, num_gap))
    console.print()
    for each in comparisons:
        console.print(f"   {sentence(each)}", markup=False)
    console.print()
    for line in LIMITS:
        console.print(f"   {line}", style="dim", markup=False)
    return {"num_covered": num_covered, "num_gap": num_gap, **to_json(rows, comparisons)}


def _item_counts(outcomes: Sequence[Outcome], num_systems: int) -> tuple[int, int]:
    num_covered = sum(is_covered(outcome.item) for outcome in outcomes) // num_systems
    return num_covered, len(outcomes) // num_systems - num_covered


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
