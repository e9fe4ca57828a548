"""Experts swapped, rolled back and reloaded under running answers: none fails, and every token names who wrote it."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fusionroute.launching import Launch, Launched, LaunchFailed
from fusionroute.swapping.canary import Canary
from fusionroute.swapping.expert_client import ExpertClient
from fusionroute.swapping.parts import Parts, Step, Timing
from fusionroute.swapping.registry_client import RegistryClient
from fusionroute.swapping.swap import Outcome, Swap, SwapReport
from fusionroute.v1.registry_pb2 import DRAIN_POLICY_FINISH, DRAIN_POLICY_MIGRATE
from fusionroute.v1.router_pb2 import CombineRule, GenerateRequest, SamplingParameters, TokenIds
from tests.expert_fakes import until
from tests.served_stack import Answer, Family, Stack, make_family, served
from tests.several_routers import Pace
from tests.tiny_models import eager_rows, save_tiny_model

pytestmark = pytest.mark.timeout(240)

NUM_ANSWERS = 4
MAX_TOKENS = 72
TOKEN_SECONDS = 0.005
"""More of each token, so that answers last while an expert is swapped."""
TIMING = Timing(start_seconds=60, drain_seconds=60, idle_seconds=0.2, poll_seconds=0.02)
MARGIN = 1e-3  # of logits; replayed and stepwise forwards agree to about 1e-6


@dataclass
class StackLauncher:
    """Experts in this process, in the loop of the test."""

    stack: Stack
    loop: asyncio.AbstractEventLoop
    names: dict[str, str] = field(default_factory=dict)
    num_started: int = 0

    async def start_serving(self, slot: str) -> None:
        """The first expert of a slot."""
        await self._start(slot, slot, str(self.stack.family.experts[slot]), standby=False)

    def start(self, launch: Launch) -> Launched:
        self.num_started += 1
        name = f"{launch.slot}-{self.num_started}"
        starting = self._start(name, launch.slot, launch.model, standby=True)
        asyncio.run_coroutine_threadsafe(starting, self.loop).result(60)
        return Launched(name)

    async def _start(self, name: str, slot: str, model: str, *, standby: bool) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.names[f"127.0.0.1:{port}"] = name
        await self.stack.start_expert(slot, name, model=model, port=port, standby=standby)

    def address_of(self, launched: Launched) -> str:
        return next(address for address, name in self.names.items() if name == launched.name)

    def check(self, launched: Launched) -> None:
        if launched.name not in self.stack.engines:
            raise LaunchFailed(f"{launched.name} ended")

    def log_tail(self, launched: Launched) -> list[str]:
        return []

    def keep(self, launched: Launched) -> None:
        return None

    def reach(self, address: str) -> str:
        return address

    def find(self, address: str) -> Launched | None:
        return Launched(self.names[address])

    def stop(self, launched: Launched, deadline_seconds: float) -> None:
        stopping = self.stack.stop_expert(launched.name)
        asyncio.run_coroutine_threadsafe(stopping, self.loop).result(60)


@dataclass
class Served:
    """A stack whose experts can be swapped."""

    stack: Stack
    parts: Parts
    steps: dict[Step, asyncio.Event]

    async def swap(self, model: Path, *, finish: bool = False, canary: Canary | None = None) -> SwapReport:
        policy = DRAIN_POLICY_FINISH if finish else DRAIN_POLICY_MIGRATE
        return await Swap(self.parts, Launch("math", str(model), "-"), policy, canary).run()

    async def epoch(self) -> int:
        """Of the slot math."""
        entries = (await self.parts.registry.list()).experts
        return max(entry.epoch for entry in entries if entry.slot == "math")


@asynccontextmanager
async def swappable(family: Family) -> AsyncIterator[Served]:
    async with (
        served(family, start=False, drafting="off", early_asks="off") as stack,
        RegistryClient.open(stack.router.server.address) as registry,
    ):
        launcher = StackLauncher(stack, asyncio.get_running_loop())
        steps = {step: asyncio.Event() for step in Step}
        parts = Parts(registry, launcher, ExpertClient.open, lambda step, _: steps[step].set(), TIMING)
        for slot in family.experts:
            await launcher.start_serving(slot)
        pace = Pace()
        pace.seconds = TOKEN_SECONDS
        pace.hold(stack)
        yield Served(stack, parts, steps)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), ("math", "strings"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("other") / "math", "qwen2", seed=77)


def a_request(number: int, *, alone: bool = False) -> GenerateRequest:
    """Greedy and seeded ones in turn; `alone` = the expert of the slot math writes by itself."""
    sampling = SamplingParameters(max_tokens=MAX_TOKENS, ignore_eos=True)
    if number % 2 and not alone:
        sampling.temperature, sampling.seed = 1.2, number
    ids = TokenIds(ids=[5 + number, 9, 30 - number])
    if alone:
        return GenerateRequest(
            token_ids=ids, sampling=sampling, fixed_expert="math", combine=CombineRule.COMBINE_RULE_ROUTE
        )
    return GenerateRequest(token_ids=ids, sampling=sampling)


async def answers_during(
    served: Served, work: asyncio.Task[object], *, alone: bool = False
) -> list[list[Answer]]:
    """Answers written one after the other, several at a time, until the work is done; by request."""

    async def keep_asking(number: int) -> list[Answer]:
        await asyncio.sleep(0.25 * number)  # so that some answer is always in its middle
        found = [await served.stack.answer(a_request(number, alone=alone))]
        while not work.done():
            found.append(await served.stack.answer(a_request(number, alone=alone)))
        return found

    return list(await asyncio.gather(*(keep_asking(number) for number in range(NUM_ANSWERS))))


def check_epochs(answers: list[list[Answer]]) -> set[tuple[int, ...]]:
    """No slot's epoch goes back within an answer. Returns the epochs of slot math, answer by answer."""
    found = set()
    for answer in [answer for several in answers for answer in several]:
        assert len(answer.tokens) == MAX_TOKENS
        for slot in ("math", "strings"):
            epochs = [token.expert_epoch for token in answer.tokens if token.expert == slot]
            assert epochs == sorted(epochs)
            assert all(epochs)
            if slot == "math":
                found.add(tuple(dict.fromkeys(epochs)))
    return found


def check_writers(answers: list[list[Answer]], models: dict[int, PreTrainedModel]) -> None:
    """Every token is what the model of the epoch that it names finds best after the tokens before it."""
    for number, several in enumerate(answers):
        for answer in several:
            ids = [*a_request(number).token_ids.ids, *answer.ids]
            rows = {epoch: eager_rows(model, ids) for epoch, model in models.items()}
            start = len(ids) - len(answer.tokens) - 1
            for place, token in enumerate(answer.tokens, start):
                row = rows[token.expert_epoch][place]
                assert row[token.id] >= row.max() - MARGIN, (number, token.index, token.expert_epoch)


def a_model(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize("finish", [False, True])
async def test_with_equal_weights_no_id_changes_while_the_expert_is_swapped(
    family: Family, tmp_path: Path, finish: bool
) -> None:
    twin = shutil.copytree(family.experts["math"], tmp_path / "twin")
    async with swappable(family) as served:
        undisturbed = [(await served.stack.answer(a_request(number))).ids for number in range(NUM_ANSWERS)]

        async def swap() -> list[SwapReport]:
            return [
                await served.swap(twin, finish=finish, canary=Canary(margin_nats=0.001))
                for _ in range(1 if finish else 2)
            ]

        swapping = asyncio.create_task(swap())
        answers = await answers_during(served, swapping)  # type: ignore[arg-type]
        reports = await swapping
        assert [[answer.ids for answer in several] for several in answers] == [
            [ids] * len(several) for ids, several in zip(undisturbed, answers, strict=True)
        ]
        epochs = check_epochs(answers)
        if not finish:
            assert any(len(each) > 1 for each in epochs), "some answer went over from one to the next"
        assert {report.outcome for report in reports} == {Outcome.SWAPPED}
        assert len(served.stack.engines) == 2


async def test_with_new_weights_every_token_names_the_epoch_that_wrote_it(
    family: Family, other: Path
) -> None:
    async with swappable(family) as served:
        old_epoch = await served.epoch()
        swapping = asyncio.create_task(served.swap(other))
        answers = await answers_during(served, swapping, alone=True)  # type: ignore[arg-type]
        report = await swapping
        answers += [[await served.stack.answer(a_request(NUM_ANSWERS, alone=True))]]
        models = {old_epoch: a_model(family.experts["math"]), report.epoch: a_model(other)}
        check_writers(answers, models)
        assert (old_epoch, report.epoch) in check_epochs(answers)
        assert {token.expert_epoch for token in answers[-1][0].tokens} == {report.epoch}


async def test_a_worse_model_is_refused_by_the_canary_and_nobody_notices(family: Family, other: Path) -> None:
    from fusionroute.swapping.parts import SwapRefused

    async with swappable(family) as served:
        before = (await served.parts.registry.list()).experts
        with pytest.raises(SwapRefused, match="worse than the old one"):
            await served.swap(other, canary=Canary())
        after = (await served.parts.registry.list()).experts
        assert [(e.instance_id, e.epoch) for e in after] == [(e.instance_id, e.epoch) for e in before]
        assert len(served.stack.engines) == 2


async def test_a_swap_rolled_back_while_it_drains_leaves_the_old_one_serving_under_a_new_epoch(
    family: Family, other: Path
) -> None:
    async with swappable(family) as served:
        old_epoch = await served.epoch()

        async def swap_and_roll_back() -> tuple[SwapReport, int]:
            swapping = asyncio.create_task(served.swap(other, finish=True))
            await served.steps[Step.DRAIN].wait()
            revision = (await served.parts.registry.list()).revision
            back = await served.parts.registry.roll_back("math", revision, DRAIN_POLICY_MIGRATE)
            return await swapping, back.epoch

        working = asyncio.create_task(swap_and_roll_back())
        answers = await answers_during(served, working, alone=True)  # type: ignore[arg-type]
        report, new_epoch = await working
        assert report.outcome is Outcome.ROLLED_BACK
        assert old_epoch < report.epoch < new_epoch
        old, new = a_model(family.experts["math"]), a_model(other)
        check_writers(answers, {old_epoch: old, report.epoch: new, new_epoch: old})
        check_epochs(answers)
        await until(lambda: served.stack.router.directory.best("math").epoch == new_epoch)  # type: ignore[union-attr]
        last = await served.stack.answer(a_request(0, alone=True))
        assert {token.expert_epoch for token in last.tokens} == {new_epoch}
        assert len(served.stack.engines) == 2


async def test_a_reload_in_place_replays_sessions_with_the_new_weights(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", ("math", "strings"))
    old = a_model(family.experts["math"])
    async with swappable(family) as served:
        old_epoch = await served.epoch()
        save_tiny_model(family.experts["math"], "llama", seed=99)
        (entry,) = [e for e in (await served.parts.registry.list()).experts if e.slot == "math"]

        async def reload() -> None:
            await asyncio.sleep(0.1)
            async with ExpertClient.open(entry.address) as expert:
                answer = await expert.reload(60)
            assert answer.previous_epoch == entry.model.epoch < answer.model.epoch
            async with asyncio.timeout(20):
                while await served.epoch() == old_epoch:
                    await asyncio.sleep(0.02)

        reloading = asyncio.create_task(reload())
        answers = await answers_during(served, reloading, alone=True)  # type: ignore[arg-type]
        await reloading
        answers += [[await served.stack.answer(a_request(NUM_ANSWERS, alone=True))]]
        new_epoch = await served.epoch()
        with torch.no_grad():
            check_writers(answers, {old_epoch: old, new_epoch: a_model(family.experts["math"])})
        assert (new_epoch,) in check_epochs(answers)
