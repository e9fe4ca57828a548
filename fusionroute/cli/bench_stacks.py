"""What `fusionroute bench` measures: trained or random models, and stacks that are started for the occasion."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from evaluation.bench_served import ServedStack
    from fusionroute.stack_state import StackState

LAB_ROUNDS = 4
"""Of one item for each task."""
PLAIN_VARIABLES = {"FUSIONROUTE_ROUTER_DRAFTING": "off", "FUSIONROUTE_ROUTER_EARLY_ASKS": "off"}

Prompts = Callable[[int], Sequence[int]]
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Models:
    """A router checkpoint and its experts, with prompts that suit them.

    Attributes:
        experts: folders by slot.
        prompts: the prompt of a number.
        is_tiny: whether their forwards take hardly more than the way between processes.
        variables: settings of the daemons, by environment variable.
        http_port: of the router; None = it speaks no HTTP, 0 = any free one.
    """

    router: str
    experts: Mapping[str, str]
    prompts: Prompts
    is_tiny: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    http_port: int | None = None

    def with_variables(self, **variables: str) -> Models:
        """The same models behind daemons with further settings."""
        return replace(self, variables={**self.variables, **variables})

    def plain(self) -> Models:
        """The same models behind a router that neither drafts nor asks experts early."""
        return self.with_variables(**PLAIN_VARIABLES)


@contextmanager
def models(lab: str, shape: str | None, dtype: str, **family: Any) -> Iterator[Models]:
    """The trained family, or one of random weights that is deleted afterwards.

    Args:
        family: further arguments of `write_family`.
    """
    if shape is None:
        yield lab_models(lab)
        return
    with random_models(shape, dtype, **family) as made:
        yield made


@contextmanager
def random_models(shape: str, dtype: str, **family: Any) -> Iterator[Models]:
    """Random weights of a shape for as long as the block lasts."""
    from evaluation.bench_shapes import SHAPES, prompt, write_family

    with tempfile.TemporaryDirectory(prefix="fusionroute-bench-") as folder:
        click.echo(f"writing random models of shape {shape}, {dtype}", err=True)
        sizes = SHAPES[shape]
        random = write_family(Path(folder), sizes, dtype, **family)
        experts = {slot: str(path) for slot, path in random.experts.items()}
        is_tiny = sizes.hidden <= 64
        yield Models(str(random.router), experts, lambda number: prompt(sizes, number=number), is_tiny)


def lab_models(lab: str, *, phase_one: bool = False) -> Models:
    """The family of `fusionroute lab build`, with held-out items as prompts.

    Args:
        phase_one: the router of phase I, which serves every combine rule.
    """
    from evaluation.items import rounds_of_items
    from fusionroute.cli.lab import build_family
    from fusionroute.vocabulary import load_tokenizer

    family = build_family(lab)
    router = str(family.router_sft if phase_one else family.router)
    tokenizer = load_tokenizer(router)
    items = [item for each in rounds_of_items(LAB_ROUNDS) for item in each]
    prompts = [tokenizer(item.prompt)["input_ids"] for item in items]
    experts = {slot: str(path) for slot, path in family.experts.items()}
    return Models(router, experts, lambda number: prompts[number % len(prompts)], is_tiny=True)


def measure(
    served: Sequence[Models], threads: int, work: Callable[[Sequence[ServedStack]], Awaitable[Found]]
) -> Found:
    """Starts a stack for each of the models, all at a time, lets the work measure them, and stops them."""
    from fusionroute.cli.stack import temporary_stack
    from fusionroute.local_stack import StackPlan

    with ExitStack() as stacks:
        states: list[StackState] = []
        for each in served:
            plan = StackPlan(
                each.router,
                each.experts,
                port=0,
                threads=threads,
                isolated=True,
                variables=each.variables,
                http_port=each.http_port,
            )
            states.append(stacks.enter_context(temporary_stack(plan))[0])
        return asyncio.run(_measure(list(zip(states, served, strict=True)), work))


async def _measure(
    running: Sequence[tuple[StackState, Models]], work: Callable[[Sequence[ServedStack]], Awaitable[Found]]
) -> Found:
    from evaluation.bench_served import ServedStack
    from fusionroute.client import RouterClient
    from fusionroute.processes import session_members

    async with AsyncExitStack() as clients:
        stacks: list[ServedStack] = []
        for state, made in running:
            pids = {record.name: [each.pid for each in session_members(record)] for record in state.processes}
            router = await clients.enter_async_context(RouterClient.open(state.router_address))
            stacks.append(
                ServedStack(router, made.router, made.experts, pids, state.addresses, state.http_urls)
            )
        return await work(stacks)


def threads_of(asked: int, num_processes: int) -> int:
    """Torch threads of each process: as asked, or the cores shared out."""
    from fusionroute.local_stack import threads_for

    return asked or threads_for(num_processes)
