"""Experts swapped again and again while answers are written, by the product's own swap code.

With equal weights nobody may notice anything. With other weights each time, every token must be the one that the
model of the epoch it names would choose after the tokens before it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from fusionroute.client import RouterClient
from fusionroute.launching import Launch
from fusionroute.swapping.canary import Canary
from fusionroute.swapping.expert_client import ExpertClient
from fusionroute.swapping.parts import Parts, Timing
from fusionroute.swapping.registry_client import RegistryClient
from fusionroute.swapping.swap import Outcome, Swap
from fusionroute.v1.registry_pb2 import DRAIN_POLICY_FINISH, DRAIN_POLICY_MIGRATE
from tests.chaos.building import running_stack
from tests.chaos.faults import Cell, Component, Fault, Hit
from tests.chaos.judge import Judgement, judge_remains, judge_stored, judge_streams, undisturbed_cases
from tests.chaos.launcher import StackLauncher
from tests.chaos.load import Clients, Stream
from tests.chaos.remains import remains_of
from tests.chaos.stack import ChaosStack, StackSettings
from tests.chaos.swap_report import EpochCheck, SwapsReport, with_expert
from tests.equivalence import Case, make_cases
from tests.served_stack import SLOTS, Family, make_family
from tests.tiny_models import save_tiny_model

SWAPS = Cell(Component.EXPERT, Fault.SWAP)
POLICIES = (DRAIN_POLICY_MIGRATE, DRAIN_POLICY_FINISH)


@dataclass(frozen=True, slots=True)
class SwapOptions:
    """What is run.

    Attributes:
        num_generations: at least; more where the swaps take longer than they.
        new_weights: every swap brings other weights.
        num_cases: different requests; they are repeated.
        num_checked: streams whose every token is held against the model of its epoch.
    """

    num_swaps: int = 20
    num_generations: int = 200
    new_weights: bool = False
    num_concurrent: int = 8
    max_tokens: int = 64
    num_cases: int = 20
    num_checked: int = 30
    seed: int = 7
    slot: str = "math"
    idle_seconds: float = 1.0
    stack: StackSettings = field(
        default_factory=lambda: StackSettings(replicas=dict.fromkeys(SLOTS, 1), forks=True)
    )


OnSwap = Callable[[int], None]
"""Hears how many swaps are done."""


async def run_swaps(
    options: SwapOptions, folder: Path, on_swap: OnSwap = lambda done: None
) -> SwapsReport:
    """Swaps under load and judges what clients have seen."""
    started_at = time.monotonic()
    family = await asyncio.to_thread(make_family, folder / "family")
    reference = replace(family.reference(), end_ids=frozenset())
    cases = await asyncio.to_thread(
        make_cases, reference, options.num_cases, max_tokens=options.max_tokens, seed=options.seed
    )
    (folder / "stack").mkdir()
    async with running_stack(family, folder / "stack", options.stack) as stack:
        run = _Run(options, stack, family, folder, cases, on_swap)
        await run.undisturbed()
        await run.load_and_swaps()
        report = SwapsReport(run.judge(), options.new_weights, run.flips)
        async with RouterClient.open(stack.routers[0].front.address) as client:
            await judge_stored(report.judgement, client, run.streams)
            await judge_remains(report.judgement, stack, client, run.streams)
    report.left_behind = remains_of(stack)
    if not options.new_weights:
        models = dict.fromkeys(run.models, reference)
    else:
        models = {epoch: with_expert(reference, options.slot, model) for epoch, model in run.models.items()}
    checking = EpochCheck(report, options.slot, reference, models, options.num_checked)
    await asyncio.to_thread(checking.run, run.streams)
    report.seconds = time.monotonic() - started_at
    return report


@dataclass(slots=True)
class _Run:
    options: SwapOptions
    stack: ChaosStack
    family: Family
    folder: Path
    cases: list[Case]
    on_swap: OnSwap
    streams: list[Stream] = field(default_factory=list)
    flips: list[int] = field(default_factory=list)
    models: dict[int, str] = field(default_factory=dict)
    """Epoch of the slot -> folder of the model."""
    failures: list[str] = field(default_factory=list)
    is_over: bool = False

    @property
    def clients(self) -> Clients:
        return Clients([node.front.address for node in self.stack.routers], 170.0)

    async def undisturbed(self) -> None:
        """Each request once, without any swap."""
        streams = [Stream(case) for case in self.cases]
        async with asyncio.TaskGroup() as group:
            for number, stream in enumerate(streams):
                group.create_task(self.clients.read(stream, number, number % 2))
        self.cases = undisturbed_cases(self.cases, streams)
        for token in (token for stream in streams for token in stream.tokens):
            if token.expert == self.options.slot:
                self.models[token.expert_epoch] = str(self.family.experts[token.expert])
        async with RouterClient.open(self.stack.routers[0].front.address) as client:
            for stream in streams:
                await client.delete_session(stream.session_id)

    async def load_and_swaps(self) -> None:
        """Generations run until all swaps are done, and at least as many as wanted."""
        requests = cycle(self.cases)
        async with asyncio.TaskGroup() as group:
            for number in range(self.options.num_concurrent):
                group.create_task(self._one_reader(number, requests))
            await self._swaps()
            self.is_over = True

    async def _one_reader(self, number: int, requests: Any) -> None:
        while not self.is_over or len(self.streams) < self.options.num_generations:
            stream = Stream(next(requests))
            self.streams.append(stream)
            await self.clients.read(stream, number, number % len(self.stack.routers))

    async def _swaps(self) -> None:
        launcher = StackLauncher(self.stack)
        routers = ",".join(node.front.address for node in self.stack.routers)
        async with RegistryClient.open(routers) as registry:
            timing = Timing(start_seconds=120.0, idle_seconds=self.options.idle_seconds, drain_seconds=30.0)
            parts = Parts(registry, launcher, ExpertClient.open, timing=timing)
            for number in range(self.options.num_swaps):
                await self._until_used()
                try:
                    await self._swap(parts, number, routers)
                except Exception as error:
                    self.failures.append(f"swap {number + 1}: {type(error).__name__}: {error}")
                self.on_swap(number + 1)

    async def _swap(self, parts: Parts, number: int, routers: str) -> None:
        model = await asyncio.to_thread(self._model_of, number)
        launch = Launch(self.options.slot, model, routers)
        canary = None if self.options.new_weights else Canary(margin_nats=0.01)

        def tell(step: object, detail: str) -> None:
            if str(getattr(step, "value", "")) == "flip":
                self.flips.append(sum(self.options.slot in s.slots for s in self.streams if s.is_in_flight))

        swap = Swap(replace(parts, tell=tell), launch, POLICIES[number % 2], canary)
        report = await swap.run()
        if report.outcome is not Outcome.SWAPPED or set(report.stopped) != set(report.retired):
            self.failures.append(f"swap {number + 1}: {report}")
        self.models[report.epoch] = model

    async def _until_used(self) -> None:
        """Waits until generations are in flight that use the slot, so that a swap hits something."""
        async with asyncio.timeout(30.0):
            while not any(s.is_in_flight and self.options.slot in s.slots for s in self.streams):
                await asyncio.sleep(0.02)

    def _model_of(self, number: int) -> str:
        if not self.options.new_weights:
            return str(self.family.experts[self.options.slot])
        return str(save_tiny_model(self.folder / f"new-{number}", "llama", seed=1000 + number))

    def judge(self) -> Judgement:
        """As a cell of the matrix; with new weights the ids are judged elsewhere."""
        hit = Hit(self.options.slot, tuple(self.streams))
        expected = [stream.case for stream in self.streams]
        if self.options.new_weights:
            expected = [_as_written(stream) for stream in self.streams]
        judgement = judge_streams(SWAPS, hit, self.streams, expected)
        for failure in self.failures:
            judgement.fail(failure)
        if len(self.streams) < self.options.num_generations or len(self.flips) < self.options.num_swaps:
            judgement.fail(f"{len(self.streams)} generations and {len(self.flips)} swaps are too few")
        if not all(self.flips):
            judgement.fail(f"some swaps hit no generation: {self.flips}")
        return judgement


def _as_written(stream: Stream) -> Case:
    return undisturbed_cases([replace(stream.case, wanted=[])], [stream])[0]
