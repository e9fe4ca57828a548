"""`fusionroute demo`: train tiny models, serve them, show fused answers token by token, and a table."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusionroute.cli.target import json_option

if TYPE_CHECKING:
    from rich.console import Console

    from fusionroute.stack_state import StackState

MAX_ITEMS_PER_TASK = 40
TABLE_SECONDS = (20.0, 110.0)
DEMO_SECONDS = 300.0
# of the table's time; the one system that is asked after the promotion needs less than a ninth of the rest
PHASE_ONE_SHARE = 0.85
PROMOTED = "lab-cdpo-demo"
PROMOTION_SECONDS = 60.0


@click.command()
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the trained family.")
@click.option("--items", "num_rounds", type=click.IntRange(1, 40), default=None,
              help="Items of each of the 23 tasks; else as many as the time allows, at most 40.")  # fmt: skip
@click.option("--budget", "budget_seconds", type=click.FloatRange(1), metavar="SECONDS",
              help="For the table, without --items.  [default: what 5 minutes leave, <= 110]")  # fmt: skip
@json_option
def demo(seed: int, num_rounds: int | None, budget_seconds: float | None, as_json: bool) -> None:
    """Everything once: build the tiny models, start the services, show answers, measure, stop.

    Three experts, a router, a trainer and a Redis run as processes of their own for as long as the demo does.
    The router begins with its checkpoint of phase I; that of phase II (CDPO) is promoted while it serves. The
    first run trains the models, about two CPU minutes; later runs find them in the cache.

    \b
    Example:
      fusionroute demo
      fusionroute demo --items 5 --json > table.json
    """
    from evaluation.tasks.lab import lab_rounds
    from fusionroute.cli.console import console
    from fusionroute.cli.lab import build_family
    from fusionroute.cli.scoreboard import PREFERRED_SUM, ask, available_systems, num_rounds_of, show_scores
    from fusionroute.cli.stack import temporary_stack
    from fusionroute.local_stack import ROUTER, StackPlan, threads_for

    screen = console(stderr=as_json)
    clock = _Clock(screen)
    with clock.stage("1  models: a base, three experts, a router (tiny, trained here or cached)"):
        family = build_family("demo", seed)
    plan = StackPlan(
        router_checkpoint=str(family.router_sft),
        experts={slot: str(path) for slot, path in family.experts.items()},
        port=0,
        http_port=0,
        threads=threads_for(1 + len(family.experts)),
        isolated=True,
        trainer=True,
    )
    with ExitStack() as running:
        with clock.stage("2  services: a router with the checkpoint of phase I, three experts, a trainer"):
            state, folder = running.enter_context(temporary_stack(plan))
        budget = float("inf") if num_rounds else budget_seconds or clock.seconds_for_the_table()
        rounds = lab_rounds(num_rounds or MAX_ITEMS_PER_TASK, seed)
        with clock.stage("3  phase I: every system answers held-out items"):
            systems = asyncio.run(available_systems(state.router_address))
            outcomes = asyncio.run(ask(screen, state.router_address, systems, rounds, PHASE_ONE_SHARE * budget))
        with clock.stage("4  phase II: the CDPO checkpoint is published, and promoted while the router serves"):
            asyncio.run(_promote(screen, state, folder, family.router))
        clock.say(f"\n   while this runs, the page in a browser: {state.http_urls[ROUTER]}/")
        with clock.stage("5  answers, each token in the colour of the expert that took part"):
            asyncio.run(_show(screen, state.router_address, seed))
        with clock.stage("6  table: the same items, asked of the new checkpoint as well"):
            asked = rounds[: num_rounds_of(outcomes)]
            outcomes += asyncio.run(ask(screen, state.router_address, [PREFERRED_SUM], asked))
            result = show_scores(screen, outcomes, [*systems, PREFERRED_SUM])
    clock.say(f"done in {clock.seconds:.0f} s; nothing is left running")
    if as_json:
        click.echo(json.dumps({"seed": seed, "seconds": round(clock.seconds, 1), **result}, indent=2))


async def _show(console: Console, address: str, seed: int) -> None:
    from evaluation.items import is_covered, rounds_of_items
    from fusionroute.cli.showcase import show_answers
    from fusionroute.client import RouterClient
    from fusionroute.lab.tasks import examples

    drawn = [item for each in rounds_of_items(4, seed) for item in each]
    gaps = [item for item in (*examples(), *drawn) if not is_covered(item)]
    async with RouterClient.open(address) as router:
        await show_answers(console, router, [item for item in examples() if is_covered(item)], gaps)


async def _promote(console: Console, state: StackState, folder: Path, checkpoint: Path) -> None:
    """Publishes a checkpoint as a finished job does, and has it promoted."""
    from fusionroute.cli.checkpoints import tell_trainer, wait_for_router
    from fusionroute.local_stack import CHECKPOINTS, TRAINER

    await asyncio.to_thread(shutil.copytree, checkpoint, folder / CHECKPOINTS / PROMOTED)
    _, revision = await tell_trainer(state.addresses[TRAINER], PROMOTED)
    info = await wait_for_router(state.router_address, revision, PROMOTION_SECONDS)
    console.print(f"   the router serves {info.checkpoint_id}; a turn begun before ends on the checkpoint of phase I")


class _Clock:
    """Headings with the time they took."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the demo began."""
        return time.monotonic() - self._started_at

    def seconds_for_the_table(self) -> float:
        """What is left of the demo's time, within limits."""
        least, most = TABLE_SECONDS
        return min(most, max(least, DEMO_SECONDS - self.seconds))

    def say(self, text: str) -> None:
        """A line between stages."""
        self._console.print(text, style="bold", markup=False)

    @contextmanager
    def stage(self, heading: str) -> Iterator[None]:
        """Prints the heading first and the seconds last."""
        began = self.seconds
        self.say(f"\n{heading}")
        yield
        self._console.print(f"   {self.seconds - began:.1f} s", style="dim", markup=False)
